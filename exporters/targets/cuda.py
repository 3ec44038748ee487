"""NVIDIA GPUs with onnxruntime."""

from epmq_deploy.exporters.targets.base import Target

TARGET = Target(
    name="cuda",
    formats=("matmulnbits", "fp16"),
    why=(
        "onnxruntime's CUDA kernel for MatMulNBits takes 4 and 8 bits; fp16 is the reference "
        "for its speed."
    ),
    unverified="its speed and accuracy; the widths are read from onnxruntime's sources, whose fast "
    "kernels need float16 activations.",
)
