"""``epmq demo``."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from epmq_deploy.cli import common
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.run import Assignments, assign
from epmq_deploy.pipeline import run_all
from epmq_deploy.recipe import load_recipe


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all stages.")] = Path(
        "epmq-demo"
    ),
    assignments: Assignments = None,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
) -> None:
    """Run the whole chain on the bundled zoo: a tiny CLIP and eight experts of it.

    \b
    Examples:
      epmq demo
      epmq demo -o ties --set merge.method=ties
    """
    with as_file(files("epmq_deploy") / "zoo") as zoo:
        recipe = assign(load_recipe(zoo / "recipe.yaml"), assignments or [])
        run_all(recipe, output, device, overwrite, Terminal(as_json, quiet))
