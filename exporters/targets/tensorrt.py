"""NVIDIA GPUs with TensorRT."""

from epmq_deploy.exporters.targets.base import Target

TARGET = Target(
    name="tensorrt",
    formats=("qdq",),
    why=(
        "TensorRT reads standard DequantizeLinear: INT4 weights in blocks of 64 or 128 without "
        "zero points (its documentation of quantization schemes); it has no blocked INT8."
    ),
    widths=(4,),
    blocks=(64, 128),
    symmetric=True,
    unverified="everything, as no engine was built; the documentation does not say whether blocks "
    "have to divide a layer's inputs.",
)
