"""``epmq quantize``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.cli import common
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.tables import stage_table
from epmq_deploy.device import pick_device
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS


@with_flags(
    (target.options for target in QUANTIZATION_METHODS.values()),
    {name: target.summary for name, target in QUANTIZATION_METHODS.items()},
)
def command(
    merged: Annotated[Path, typer.Argument(help="Output of `epmq merge`.")],
    output: common.Output,
    recipe: common.RecipeFile = None,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Quantize a merged model to low-bit codes.

    \b
    Examples:
      epmq quantize merged -o quantized
      epmq quantize merged -o quantized --method gptq --bits 3 --group-size 32
      epmq quantize merged -o quantized --anchor 0.2 --skip '*.layers.0.*'
    """
    from epmq_deploy.quantization.stage import quantize

    terminal = Terminal(as_json, quiet)
    manifest = quantize(
        common.recipe_of(recipe, merged, "merge", "quantize", flags),
        merged,
        output,
        overwrite=overwrite,
        device=pick_device(device),
        progress=terminal,
    )
    data = {"output": str(output), **manifest.details}
    terminal.result(data, stage_table(manifest, str(output)))
