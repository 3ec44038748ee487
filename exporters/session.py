"""onnxruntime sessions of exported graphs, and the settings they need to run as verified."""

from pathlib import Path
from typing import Any

import onnxruntime

# A DequantizeLinear graph cannot carry the accuracy level of the MatMulNBits nodes it becomes;
# without this entry onnxruntime computes them in int8 (level 4).
QDQ_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"

# The accuracy level of MatMulNBits that rounds activations to int8.
INT8_LEVEL = 4

_ERRORS_ONLY = 3


def session_config(accuracy_level: int) -> dict[str, str]:
    """Entries for ``SessionOptions.add_session_config_entry``; harmless for any format."""
    return {QDQ_ACCURACY_LEVEL: str(accuracy_level)}


def cpu_session(path: Path, accuracy_level: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on the processor, quiet."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    for key, value in session_config(accuracy_level).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
