"""Running exported graphs in onnxruntime: in applications (`load`), and to evaluate them.

Rooms: `ort` creates and runs sessions, `evaluation` measures, `report` shows what was measured,
`inference` serves applications. Names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epmq_deploy.runtime.inference.base import ExportedModel
    from epmq_deploy.runtime.inference.classifier import ExportedClassifier, Prediction
    from epmq_deploy.runtime.inference.load import load
    from epmq_deploy.runtime.inference.text_generation import Answer, ExportedTextGenerator
    from epmq_deploy.runtime.stage import evaluate

_MODULE_OF = {
    "Answer": "inference.text_generation",
    "ExportedClassifier": "inference.classifier",
    "ExportedModel": "inference.base",
    "ExportedTextGenerator": "inference.text_generation",
    "Prediction": "inference.classifier",
    "evaluate": "stage",
    "load": "inference.load",
}

__all__ = [
    "Answer",
    "ExportedClassifier",
    "ExportedModel",
    "ExportedTextGenerator",
    "Prediction",
    "evaluate",
    "load",
]

# Deprecated names.
_RENAMED = {
    "DeployedClassifier": "ExportedClassifier",
    "DeployedModel": "ExportedModel",
    "DeployedTextGenerator": "ExportedTextGenerator",
    "DeployedWriter": "ExportedTextGenerator",
}


def __getattr__(name: str) -> Any:
    name = _RENAMED.get(name, name)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
