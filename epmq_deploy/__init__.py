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

from typing import TYPE_CHECKING

from epmq_deploy.lazy import exports
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
__getattr__ = exports(__name__, _MODULES)

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


def __dir__() -> list[str]:
    return __all__
