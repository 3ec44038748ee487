"""Intel devices with OpenVINO."""

from epmq_deploy.exporters.targets.base import Target

TARGET = Target(
    name="openvino",
    formats=("qdq",),
    why=(
        "OpenVINO reads standard DequantizeLinear in 4 and 8 bits, with and without zero "
        "points, but only blocks that divide a layer's inputs (measured with 2026.4 on CPU)."
    ),
    whole_blocks=True,
    unverified="OpenVINO's GPU and NPU plugins; its CPU plugin quantizes activations to int8 "
    "unless DYNAMIC_QUANTIZATION_GROUP_SIZE is 0, so evaluate there.",
)
