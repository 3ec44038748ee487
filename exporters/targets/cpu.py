"""CPUs with onnxruntime."""

from epmq_deploy.exporters.targets.base import Target

TARGET = Target(
    name="cpu",
    formats=("int8-expand", "matmulnbits"),
    why=(
        "int8-expand multiplies in int8, the fastest way measured on x86; matmulnbits computes in "
        "float32, for models that lose accuracy with int8 activations."
    ),
    two_bit_containers=True,
)
