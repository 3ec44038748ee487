"""Running exported graphs in onnxruntime: in applications (`load`), and to evaluate them.

Packages: `ort` creates and runs sessions, `evaluation` measures, `report` shows what was measured,
`inference` serves applications. Names are imported when first used.
"""

from typing import TYPE_CHECKING, Any

from epmq_deploy.lazy import exports

if TYPE_CHECKING:
    from epmq_deploy.runtime.inference.base import ExportedModel
    from epmq_deploy.runtime.inference.classifier import (
        Embedding,
        ExportedClassifier,
        LabelSet,
        Prediction,
        Value,
    )
    from epmq_deploy.runtime.inference.load import load
    from epmq_deploy.runtime.inference.text_generation import Answer, ExportedTextGenerator
    from epmq_deploy.runtime.inference.words import LabelledText, Span
    from epmq_deploy.runtime.stage import evaluate

_load = exports(
    __name__,
    {
        "epmq_deploy.runtime.inference.base": ("ExportedModel",),
        "epmq_deploy.runtime.inference.classifier": (
            "Embedding",
            "ExportedClassifier",
            "LabelSet",
            "Prediction",
            "Value",
        ),
        "epmq_deploy.runtime.inference.load": ("load",),
        "epmq_deploy.runtime.inference.text_generation": ("Answer", "ExportedTextGenerator"),
        "epmq_deploy.runtime.inference.words": ("LabelledText", "Span"),
        "epmq_deploy.runtime.stage": ("evaluate",),
    },
)

__all__ = [
    "Answer",
    "Embedding",
    "ExportedClassifier",
    "ExportedModel",
    "ExportedTextGenerator",
    "LabelSet",
    "LabelledText",
    "Prediction",
    "Span",
    "Value",
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
    return _load(_RENAMED.get(name, name))
