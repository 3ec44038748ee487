"""``epmq quantize``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.cli.flags import with_flags
from epmq_deploy.cli.options import (
    CommonOptions,
    OutputFolder,
    PreflightFlag,
    RecipeFile,
    needed,
    recipe_of,
)
from epmq_deploy.recipe import with_preflight
from epmq_deploy.registry import QUANTIZATION_METHODS


@with_flags(method.options for method in QUANTIZATION_METHODS.values())
def command(
    merged: Annotated[Path | None, typer.Argument(help="Output of `epmq merge`.")] = None,
    output: OutputFolder = None,
    recipe: RecipeFile = None,
    list_methods: Annotated[
        bool, typer.Option("--list", help="List all quantization methods and exit.")
    ] = False,
    preflight: PreflightFlag = None,
    *,
    common: CommonOptions,
    flags: dict[str, Any],
) -> None:
    """Quantize a merged model to low-bit codes.

    \b
    Examples:
      epmq quantize merged -o quantized
      epmq quantize merged -o quantized --method gptq --bits 3 --group-size 32
      epmq quantize merged -o quantized --anchor 0.2 --skip '*.layers.0.*'
      epmq quantize --list
    """
    terminal = common.terminal()
    if list_methods:
        from epmq_deploy.cli.listings import methods_data, methods_table
        from epmq_deploy.options.quantization import QuantizeOptions

        sources = {name: method.source for name, method in QUANTIZATION_METHODS.items()}
        data = methods_data(QUANTIZATION_METHODS, QuantizeOptions, sources)
        terminal.result(data, methods_table("quantization methods", data))
        return
    source, folder = needed(merged, "MERGED"), needed(output, "--output")
    from epmq_deploy.cli.tables import stage_table
    from epmq_deploy.quantization.stage import quantize

    manifest = quantize(
        with_preflight(recipe_of(recipe, source, "merge", "quantize", flags), preflight),
        source,
        folder,
        overwrite=common.overwrite,
        device=common.torch_device(),
        progress=terminal,
    )
    data = {"output": str(folder), **manifest.reported}
    terminal.result(data, stage_table(manifest, str(folder)))
