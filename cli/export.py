"""``epmq export``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.options import CommonOptions, OutputFolder, RecipeFile, needed, recipe_of
from epmq_deploy.cli.process import free_memory_eagerly
from epmq_deploy.recipe import ExportOptions


@with_flags([ExportOptions])
def command(
    quantized: Annotated[Path | None, typer.Argument(help="Output of `epmq quantize`.")] = None,
    output: OutputFolder = None,
    recipe: RecipeFile = None,
    list_formats: Annotated[
        bool, typer.Option("--list", help="List all formats and deployment targets and exit.")
    ] = False,
    *,
    common: CommonOptions,
    flags: dict[str, Any],
) -> None:
    """Pack the exact codes into ONNX files, next to the merged model in fp32.

    \b
    Examples:
      epmq export quantized -o exported
      epmq export quantized -o exported --target cpu
      epmq export quantized -o exported --formats matmulnbits --accuracy-level 4
      epmq export --list
    """
    terminal = common.terminal()
    if list_formats:
        from epmq_deploy.cli.listings import formats_data, formats_tables

        data = formats_data()
        terminal.result(data, formats_tables(data))
        return
    source, folder = needed(quantized, "QUANTIZED"), needed(output, "--output")
    from epmq_deploy.cli.tables import export_table
    from epmq_deploy.exporters.stage import export

    free_memory_eagerly()
    manifest = export(
        recipe_of(recipe, source, "quantize", "export", flags),
        source,
        folder,
        overwrite=common.overwrite,
        device=common.torch_device(),
        progress=terminal,
    )
    data = {"output": str(folder), **manifest.reported}
    terminal.result(data, export_table(manifest, str(folder)))
