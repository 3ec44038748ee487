"""Qualcomm NPUs with onnxruntime's QNN provider."""

from epmq_deploy.exporters.targets.base import Target

TARGET = Target(
    name="qnn",
    formats=("matmulnbits",),
    why=(
        "the QNN provider translates 4-bit MatMulNBits to its block-quantized operators; "
        "blocked DequantizeLinear runs on the processor instead (onnxruntime-qnn issue 650)."
    ),
    widths=(4,),
    symmetric=True,
    unverified="which QAIRT versions and backends run it, as no device was at hand. Shapes must be "
    "fixed first, with onnxruntime.tools.make_dynamic_shape_fixed.",
)
