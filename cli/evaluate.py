"""``epmq eval``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epmq_deploy.cli import common
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import EvalOptions, Recipe, load_recipe, override
from epmq_deploy.stage import atomic_text, read_manifest

if TYPE_CHECKING:
    from epmq_deploy.runtime.report import EvalReport

EVAL_FILE = "eval.json"


@with_flags([EvalOptions])
def command(
    exported: Annotated[Path, typer.Argument(help="Output of `epmq export`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; DIR/eval.json when absent."),
    ] = None,
    recipe: common.RecipeFile = None,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Run every exported graph in onnxruntime on every task and compare.

    Ends with exit code 5 when a graph loses more than --max-drop points.

    \b
    Examples:
      epmq eval exported
      epmq eval exported --max-drop 0.5 --threads 2 --overwrite
    """
    terminal = Terminal(as_json, quiet)
    carried = load_recipe(recipe) if recipe else read_manifest(exported, "export").recipe
    chosen = override(carried, "eval", flags)
    evaluate_to(output or exported / EVAL_FILE, chosen, exported, device, overwrite, terminal)


def evaluate_to(
    file: Path,
    recipe: Recipe,
    exported: Path,
    device: DeviceName,
    overwrite: bool,
    terminal: Terminal,
) -> None:
    """Evaluate, write ``file``, show the table, then hold the gate."""
    from epmq_deploy.runtime.evaluation import evaluate

    refuse_existing_file(file, overwrite)
    report = evaluate(
        recipe, exported, provider=device, device=pick_device(device), progress=terminal
    )
    atomic_text(file, json.dumps(report.as_dict(), indent=2) + "\n")
    show(report, recipe.eval.max_drop, terminal)


def show(report: "EvalReport", max_drop: float | None, terminal: Terminal) -> None:
    """Print a report and hold its low-bit graphs against the gate."""
    from epmq_deploy.cli.tables import eval_table

    terminal.result(report.as_dict(), eval_table(report))
    report.check_drop(max_drop)


def refuse_existing_file(file: Path, overwrite: bool) -> None:
    """Stop before any work when a file cannot be written.

    Raises:
        RecipeError: it is a folder, lies in no folder, or may not be replaced.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise RecipeError(f"{file}: expected a file in an existing folder")
    if file.exists() and not overwrite:
        raise RecipeError(f"{file} already exists; choose another output or pass --overwrite")
