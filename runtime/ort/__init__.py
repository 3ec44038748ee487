"""Sessions of onnxruntime: created, configured, run in worker processes."""
