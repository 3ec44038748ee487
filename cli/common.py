"""What commands share: parameters, and the recipe they go by."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.device import DeviceName
from epmq_deploy.recipe import Recipe, load_recipe, override

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[
    DeviceName, typer.Option("--device", help="Where to compute; auto takes CUDA when there.")
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", help="Take tasks and options from this recipe, not from the input folder's."
    ),
]


def recipe_of(
    file: Path | None, source: Path, stage: str, section: str, flags: dict[str, Any]
) -> Recipe:
    """The recipe given, or else the input folder's, with a section's options from flags.

    Args:
        file: the recipe given.
        source: the input folder.
        stage: that wrote it.
        section: of the recipe that flags belong to.
        flags: options by name; None means not given.
    """
    carried = load_recipe(file) if file else read_manifest(source, stage).recipe
    return override(carried, section, flags)
