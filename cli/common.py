"""Parameters that commands share."""

from pathlib import Path
from typing import Annotated

import typer

from epmq_deploy.device import DeviceName

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
