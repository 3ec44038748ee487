"""From a torch model to ONNX graphs with low-bit layers, written tensor by tensor."""
