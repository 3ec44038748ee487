"""Parameters that several commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.process import log_errors_only
from epmq_deploy.device import DeviceName, pick_device
from epmq_deploy.recipe import Preflight, Recipe, load_recipe, override

if TYPE_CHECKING:
    import torch

    from epmq_deploy.artifacts.manifest import Stage

OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to write; an existing one needs --overwrite."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="Take tasks and options from this recipe instead of the one in the input folder.",
    ),
]

_PREFLIGHT = Recipe.model_fields["preflight"].description or ""
PreflightFlag = Annotated[
    Preflight | None,
    typer.Option("--preflight", help=f"{_PREFLIGHT[:1].upper()}{_PREFLIGHT[1:]}."),
]


@dataclass(frozen=True)
class CommonOptions:
    """Flags of every command.

    Attributes:
        device: where to compute.
        overwrite: whether an earlier output may be replaced.
        as_json: whether results are printed as JSON.
        quiet: whether nothing but errors is printed.
    """

    device: Annotated[
        DeviceName,
        typer.Option("--device", help="Where to compute; auto uses CUDA if available."),
    ] = "auto"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False

    def terminal(self) -> Terminal:
        """Return the terminal, having set how much of the log it shows."""
        if self.quiet:
            log_errors_only()
        return Terminal(self.as_json, self.quiet)

    def torch_device(self) -> "torch.device":
        """Return the device to compute on.

        Raises:
            RecipeError: CUDA was asked for and is not available.
        """
        return pick_device(self.device)


def needed(path: Path | None, name: str) -> Path:
    """Return a path that a command cannot work without.

    Args:
        path: as given by the user.
        name: of the flag or argument.

    Raises:
        typer.BadParameter: it was not given.
    """
    if path is None:
        raise typer.BadParameter("required unless --list is given", param_hint=name)
    return path


def recipe_of(
    file: Path | None, source: Path, stage: "Stage", section: str, flags: dict[str, Any]
) -> Recipe:
    """Return the recipe given, or else the input folder's, with a section's options from flags.

    Args:
        file: the recipe given by the user.
        source: the input folder.
        stage: the stage that wrote the input folder.
        section: the recipe's section that flags belong to.
        flags: options by name; None means not given.

    Raises:
        RecipeError: an unreadable recipe, no such folder, or an option that is not allowed.
    """
    from epmq_deploy.artifacts.manifest import read_manifest

    recipe = load_recipe(file) if file else read_manifest(source, stage).recipe
    return override(recipe, section, flags)
