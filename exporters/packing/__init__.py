"""How codes lie in bytes: layers as onnxruntime takes them, and ONNX integer tensors."""
