"""Settings an onnxruntime session needs for an exported graph to run as it was verified."""

# A DequantizeLinear graph cannot carry the accuracy level of the MatMulNBits nodes it becomes;
# without this entry onnxruntime computes them in int8 (level 4).
QDQ_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
# x86 processors without VNNI add pairs of int8 products in 16 bits, which overflows; with this entry
# onnxruntime takes slower, exact products there. It changes nothing on others.
INTEGER_PRECISION = "session.x64quantprecision"


def session_config(accuracy_level: int) -> dict[str, str]:
    """Entries for ``SessionOptions.add_session_config_entry``; harmless for any format."""
    return {QDQ_ACCURACY_LEVEL: str(accuracy_level), INTEGER_PRECISION: "1"}
