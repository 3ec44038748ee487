"""Integer GEMM in standard ONNX."""
