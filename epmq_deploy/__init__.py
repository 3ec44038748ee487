"""Merge fine-tuned experts, quantize the result with E-PMQ and deploy it as ONNX.

    import epmq_deploy as epmq

    recipe = epmq.load_recipe("recipe.yaml")
    merged = epmq.merge(recipe, "out/merged")
    quantized = epmq.quantize(merged, "out/quantized", bits=4)
    exported = epmq.export(quantized, "out/exported", target="cpu")
    report = epmq.evaluate(exported)
    model = epmq.load("out/exported")

Importing this package loads neither torch nor onnxruntime; names are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from epmq_deploy.version import __version__

if TYPE_CHECKING:
    from epmq_deploy.api import (
        check_gates,
        evaluate,
        export,
        load,
        merge,
        quantize,
        run,
    )
    from epmq_deploy.artifacts.outputs import StageOutput
    from epmq_deploy.errors import (
        EpmqError,
        GateError,
        MismatchError,
        NumericsError,
        RecipeError,
    )
    from epmq_deploy.progress import Progress
    from epmq_deploy.recipe import DataSource, Head, Recipe, Task, load_recipe
    from epmq_deploy.runtime.evaluation.report import EvalReport

_MODULES = {
    "epmq_deploy.api": (
        "check_gates",
        "evaluate",
        "export",
        "load",
        "merge",
        "quantize",
        "run",
    ),
    "epmq_deploy.artifacts.outputs": ("StageOutput",),
    "epmq_deploy.errors": (
        "EpmqError",
        "GateError",
        "MismatchError",
        "NumericsError",
        "RecipeError",
    ),
    "epmq_deploy.progress": ("Progress",),
    "epmq_deploy.recipe": ("DataSource", "Head", "Recipe", "Task", "load_recipe"),
    "epmq_deploy.runtime.evaluation.report": ("EvalReport",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DataSource",
    "EpmqError",
    "EvalReport",
    "GateError",
    "Head",
    "MismatchError",
    "NumericsError",
    "Progress",
    "Recipe",
    "RecipeError",
    "StageOutput",
    "Task",
    "__version__",
    "check_gates",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "merge",
    "quantize",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
