"""``epmq demo``."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from epmq_deploy.cli.evaluate import show_report
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.options import CommonOptions
from epmq_deploy.cli.process import free_memory_eagerly, silence_onnxruntime
from epmq_deploy.cli.run import Assignments, assign
from epmq_deploy.recipe import load_recipe


@with_flags()
def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all stages.")] = Path(
        "epmq-demo"
    ),
    assignments: Assignments = None,
    *,
    common: CommonOptions,
) -> None:
    """Run the whole chain on the bundled zoo: a tiny CLIP and eight experts of it.

    \b
    Examples:
      epmq demo
      epmq demo -o ties --set merge.method=ties
    """
    from epmq_deploy.pipeline import run

    terminal = common.terminal()
    silence_onnxruntime()
    free_memory_eagerly()
    with as_file(files("epmq_deploy") / "zoo") as zoo:
        recipe = assign(load_recipe(zoo / "recipe.yaml"), assignments or [])
        report = run(
            recipe,
            output,
            overwrite=common.overwrite,
            device=common.device,
            progress=terminal,
        )
    show_report(report, terminal)
