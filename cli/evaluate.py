"""``epmq eval``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.options import CommonOptions, PreflightFlag, RecipeFile, recipe_of
from epmq_deploy.cli.process import silence_onnxruntime
from epmq_deploy.device import pick_device
from epmq_deploy.recipe import EvalOptions, with_preflight

if TYPE_CHECKING:
    from epmq_deploy.runtime.evaluation.report import EvalReport


@with_flags([EvalOptions])
def command(
    exported: Annotated[Path, typer.Argument(help="Output of `epmq export`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file to write; default: eval.json in EXPORTED."),
    ] = None,
    recipe: RecipeFile = None,
    preflight: PreflightFlag = None,
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
    from epmq_deploy.pipeline import provider_for
    from epmq_deploy.runtime.stage import evaluate

    terminal = common.terminal()
    silence_onnxruntime()
    changed = with_preflight(recipe_of(recipe, exported, "export", "eval", flags), preflight)
    report = evaluate(
        changed,
        exported,
        output,
        overwrite=common.overwrite,
        # --device also selects the provider, unless one is given explicitly.
        provider=provider_for(changed.eval, common.device),
        device=pick_device(common.device),
        progress=terminal,
    )
    show_report(report, terminal)


def show_report(report: "EvalReport", terminal: Terminal) -> None:
    """Print a report, then check its gates.

    Raises:
        GateError: no low-bit graph meets all gates.
    """
    from epmq_deploy.cli.eval_table import eval_table
    from epmq_deploy.runtime.evaluation.gates import check_gates
    from epmq_deploy.runtime.report.json_report import report_dict

    terminal.result(report_dict(report), eval_table(report))
    check_gates(report)
