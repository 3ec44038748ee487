"""Running exported graphs in onnxruntime: sessions, accuracy, latency, report."""
