"""``epmq export``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.cli import common
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.tables import export_table
from epmq_deploy.device import pick_device
from epmq_deploy.recipe import ExportOptions


@with_flags([ExportOptions])
def command(
    quantized: Annotated[Path, typer.Argument(help="Output of `epmq quantize`.")],
    output: common.Output,
    recipe: common.RecipeFile = None,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Pack the exact codes into ONNX files, with the fp32 merged model beside them.

    \b
    Examples:
      epmq export quantized -o exported
      epmq export quantized -o exported --formats matmulnbits --accuracy-level 4
    """
    from epmq_deploy.exporters.stage import export

    terminal = Terminal(as_json, quiet)
    manifest = export(
        common.recipe_of(recipe, quantized, "quantize", "export", flags),
        quantized,
        output,
        overwrite=overwrite,
        device=pick_device(device),
        progress=terminal,
    )
    data = {"output": str(output), **manifest.details}
    terminal.result(data, export_table(manifest, str(output)))
