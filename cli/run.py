"""``epmq run``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.evaluate import show_report
from epmq_deploy.cli.flags import SEVERAL_HELP, with_flags
from epmq_deploy.cli.options import CommonOptions, PreflightFlag
from epmq_deploy.cli.process import free_memory_eagerly, silence_onnxruntime
from epmq_deploy.errors import RecipeError
from epmq_deploy.options import YamlError, read_yaml, split_entries
from epmq_deploy.recipe import Recipe, load_recipe, override, with_preflight

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help=f"Override the recipe: section.option=value; {SEVERAL_HELP}."),
]


@with_flags()
def command(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all stages.")],
    assignments: Assignments = None,
    preflight: PreflightFlag = None,
    *,
    common: CommonOptions,
) -> None:
    """Merge, quantize, export and evaluate; stages already done with the same inputs are skipped.

    \b
    Examples:
      epmq run recipe.yaml -o out
      epmq run recipe.yaml -o out --set quantize.bits=3,eval.max_drop=1 --overwrite
    """
    terminal = common.terminal()
    changed = with_preflight(assign(load_recipe(recipe), assignments or []), preflight)
    run_recipe(changed, output, common, terminal)


def run_recipe(recipe: Recipe, output: Path, common: CommonOptions, terminal: Terminal) -> None:
    """Run all stages of a recipe, print the report, then check its gates.

    Raises:
        EpmqError: see ``epmq_deploy.run``; no low-bit graph meets all gates.
    """
    # After the recipe was read, so that a wrong one is refused at once.
    from epmq_deploy.pipeline import run

    silence_onnxruntime()
    free_memory_eagerly()
    report = run(
        recipe, output, overwrite=common.overwrite, device=common.device, progress=terminal
    )
    show_report(report, terminal)


def assign(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Apply ``section.option=value`` texts; values are read as YAML.

    Raises:
        RecipeError: not of that form, no such section, given twice, or a value that is not allowed.
    """
    flags: dict[str, dict[str, Any]] = {}
    for text in split_entries(assignments, start=r"\w+\.\w+="):
        key, equals, value = text.partition("=")
        section, dot, option = key.partition(".")
        if not (equals and dot) or section not in ("merge", "quantize", "export", "eval"):
            raise RecipeError(
                f"--set {text}: expected section.option=value with section merge, quantize, "
                "export or eval"
            )
        options = flags.setdefault(section, {})
        if option in options:
            raise RecipeError(f"--set {key} is given twice; keep one of them")
        try:
            options[option] = read_yaml(value).content
        except YamlError as error:
            raise RecipeError(f"--set {text}: {value!r} is not YAML; quote it") from error
    for section, options in flags.items():
        recipe = override(recipe, section, options)
    return recipe
