"""``epmq eval``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epmq_deploy.artifacts.folders import atomic_text
from epmq_deploy.artifacts.names import MANIFEST
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.options import CommonOptions, RecipeFile, recipe_of
from epmq_deploy.cli.process import silence_onnxruntime
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import EvalOptions, Recipe

if TYPE_CHECKING:
    from epmq_deploy.runtime.report.model import EvalReport

EVAL_FILE = "eval.json"


@with_flags([EvalOptions])
def command(
    exported: Annotated[Path, typer.Argument(help="Output of `epmq export`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file to write; default: eval.json in EXPORTED."),
    ] = None,
    recipe: RecipeFile = None,
    *,
    common: CommonOptions,
    flags: dict[str, Any],
) -> None:
    """Run every exported graph in onnxruntime on every task and compare them.

    Writes eval.json, eval.md and report.html. Ends with exit code 5 if no
    low-bit graph meets all gates (--max-drop, --max-latency-ratio, --max-size).

    \b
    Examples:
      epmq eval exported
      epmq eval exported --max-drop 0.5 --max-size 60 --threads 1,2 --overwrite
      epmq eval exported --diagnose --provider cuda -o cuda.json
    """
    terminal = common.terminal()
    silence_onnxruntime()
    evaluate_to(
        output or exported / EVAL_FILE,
        recipe_of(recipe, exported, "export", "eval", flags),
        exported,
        common.device,
        common.overwrite,
        terminal,
    )


def evaluate_to(
    file: Path,
    recipe: Recipe,
    exported: Path,
    device: DeviceName,
    overwrite: bool,
    terminal: Terminal,
) -> None:
    """Evaluate, write the report next to ``file`` in all its forms, print it, check the gates.

    Raises:
        RecipeError: a file to write cannot be written, or an option is not allowed.
        MismatchError: data or models do not fit.
        GateError: no low-bit graph meets all gates.
    """
    from epmq_deploy.runtime.evaluation.stage import evaluate

    for target in (file, *views_of(file)):
        refuse_existing_file(target, overwrite)
    # --device also selects the provider, unless one is given explicitly.
    provider = device if recipe.eval.provider == "auto" else recipe.eval.provider
    report = evaluate(
        recipe, exported, provider=provider, device=pick_device(device), progress=terminal
    )
    write_and_show(file, report, terminal)


def write_and_show(file: Path, report: "EvalReport", terminal: Terminal) -> None:
    """Write a report as JSON, Markdown and HTML, print it, then check its gates.

    The report in an export's folder is also shown in the model card there.

    Raises:
        GateError: no low-bit graph meets all gates.
    """
    from epmq_deploy.artifacts.card import Evaluation, write_card
    from epmq_deploy.artifacts.manifest import read_manifest
    from epmq_deploy.cli.eval_table import eval_table
    from epmq_deploy.models import family_of
    from epmq_deploy.runtime.evaluation.gates import check_gates
    from epmq_deploy.runtime.report.json import report_dict
    from epmq_deploy.runtime.report.markdown import markdown_table
    from epmq_deploy.runtime.report.page import html_page

    content = report_dict(report)
    markdown, page = views_of(file)
    table = markdown_table(report)
    atomic_text(file, json.dumps(content, indent=2) + "\n")
    atomic_text(markdown, table)
    atomic_text(page, html_page(report))
    if file.name == EVAL_FILE and (file.parent / MANIFEST).is_file():
        evaluation = Evaluation(
            table,
            family_of(file.parent).task_type,
            {row.name: row.accuracy for row in report.rows if row.files},
            report.hub_metrics,
        )
        write_card(file.parent, read_manifest(file.parent, "export"), evaluation)
    terminal.result(content, eval_table(report))
    check_gates(report)


def views_of(file: Path) -> tuple[Path, Path]:
    """Return the paths of a report's Markdown table and HTML page, next to its JSON file.

    Raises:
        RecipeError: ``file`` has the name of one of these.
    """
    if file.suffix in (".md", ".html"):
        raise RecipeError(f"{file}: name the JSON file; the others are written next to it")
    page = "report.html" if file.name == EVAL_FILE else f"{file.stem}.html"
    return file.with_suffix(".md"), file.with_name(page)


def refuse_existing_file(file: Path, overwrite: bool) -> None:
    """Raise before any work if a file cannot be written.

    Raises:
        RecipeError: it is a folder, its folder does not exist, or it may not be replaced.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise RecipeError(f"{file}: expected a file in an existing folder")
    if file.exists() and not overwrite:
        raise RecipeError(f"{file} already exists; choose another output or pass --overwrite")
