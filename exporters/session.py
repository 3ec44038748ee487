"""Settings an onnxruntime session needs for an exported graph to run as it was verified."""

# A DequantizeLinear graph cannot carry the accuracy level of the MatMulNBits nodes it becomes;
# without this entry onnxruntime computes them in int8 (level 4).
QDQ_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"


def session_config(accuracy_level: int) -> dict[str, str]:
    """Entries for ``SessionOptions.add_session_config_entry``; harmless for any format."""
    return {QDQ_ACCURACY_LEVEL: str(accuracy_level)}
