"""CPUs with onnxruntime."""

from epmq_deploy.exporters.targets.base import Target

TARGET = Target(
    name="cpu",
    formats=("int8-expand", "matmulnbits"),
    why=(
        "int8-expand multiplies in int8, the fastest way on x86 and ARM processors; "
        "matmulnbits stays in float32, for models whose accuracy int8 activations cost."
    ),
    two_bit_containers=True,
)
