"""Packing codes into bytes: layers as onnxruntime takes them, and ONNX integer tensors."""
