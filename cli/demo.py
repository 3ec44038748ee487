"""``epmq demo``."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.options import CommonOptions
from epmq_deploy.cli.run import Assignments, assign, run_recipe
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
    terminal = common.terminal()
    with as_file(files("epmq_deploy") / "zoo") as zoo:
        recipe = assign(load_recipe(zoo / "recipe.yaml"), assignments or [])
        run_recipe(recipe, output, common, terminal)
