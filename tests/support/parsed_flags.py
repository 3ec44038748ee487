"""Flags made from option models, as a command reads them."""

from collections.abc import Sequence
from typing import Any

import typer
from typer.testing import CliRunner

from epmq_deploy.cli.flags import with_flags
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.options import Options
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.recipe import EvalOptions, ExportOptions, Recipe, override

MODELS: dict[str, list[type[Options]]] = {
    "merge": [method.options for method in MERGE_METHODS.values()],
    "quantize": [target.options for target in QUANTIZATION_METHODS.values()],
    "export": [ExportOptions],
    "eval": [EvalOptions],
}


def parsed(recipe: Recipe, section: str, arguments: Sequence[str]) -> Recipe:
    """The recipe with a section's options changed by flags."""
    found: list[Recipe] = []
    small = typer.Typer()

    @small.command()
    @with_flags(MODELS[section])
    def command(*, flags: dict[str, Any]) -> None:
        found.append(override(recipe, section, flags))

    result = CliRunner().invoke(small, arguments)
    assert result.exit_code == 0, result.output
    return found[0]
