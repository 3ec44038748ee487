"""``epmq merge``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from epmq_deploy.cli import common
from epmq_deploy.cli.console import Terminal
from epmq_deploy.cli.flags import SEVERAL_HELP, with_flags
from epmq_deploy.cli.tables import stage_table
from epmq_deploy.device import pick_device
from epmq_deploy.errors import RecipeError
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.options import split_entries
from epmq_deploy.options.merging import MergeOptions
from epmq_deploy.recipe import Recipe, absolute_paths, load_recipe, override, parse_recipe


@with_flags(
    (method.options for method in MERGE_METHODS.values()),
    {name: f"{method.summary} ({method.source})" for name, method in MERGE_METHODS.items()},
)
def command(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist yet.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: folder, hub id (owner/name@revision) or open_clip:NAME=PATH."
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help=f"An expert as name=path, path being as of --base; {SEVERAL_HELP}."),
    ] = None,
    list_methods: Annotated[
        bool, typer.Option("--list", help="Explain all merge methods and their options, and end.")
    ] = False,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Merge experts into one Hugging Face folder.

    \b
    Examples:
      epmq merge recipe.yaml -o merged
      epmq merge recipe.yaml -o merged --method ties --density 0.1
      epmq merge --base clip --expert cars=experts/cars --expert sun=experts/sun -o merged
      epmq merge recipe.yaml -o merged --method iso_c --search
      epmq merge --list
    """
    from epmq_deploy.merging.stage import merge

    terminal = Terminal(as_json, quiet)
    if list_methods:
        terminal.result(_methods(), _methods_table())
        return
    if output is None:
        raise typer.BadParameter("needed to merge", param_hint="--output")
    chosen = override(_recipe(recipe, base, expert or []), "merge", flags)
    manifest = merge(
        chosen, output, overwrite=overwrite, device=pick_device(device), progress=terminal
    )
    data = {"output": str(output), **manifest.details}
    terminal.result(data, stage_table(manifest, str(output)))


def _methods() -> dict[str, Any]:
    """All methods and their own options, as plain data."""
    return {
        "methods": [
            {
                "name": method.name,
                "summary": method.summary,
                "source": method.source,
                "options": {
                    name: {"default": field.default, "description": field.description}
                    for name, field in method.options.model_fields.items()
                    if name not in MergeOptions.model_fields
                },
            }
            for method in MERGE_METHODS.values()
        ]
    }


def _methods_table() -> Table:
    """All methods, a line each."""
    table = Table(title="merge methods", caption="--json has their options; --help explains them")
    for title in ("name", "what it does", "source"):
        table.add_column(title, no_wrap=title == "name")
    for method in MERGE_METHODS.values():
        table.add_row(method.name, escape(method.summary), escape(method.source))
    return table


def _recipe(file: Path | None, base: str | None, experts: list[str]) -> Recipe:
    """The recipe, or one made of flags alone; flags win over the file."""
    pairs = dict(_pair(text) for text in split_entries(experts, start=r"[\w-]+="))
    if file is None:
        if base is None or not pairs:
            raise RecipeError("give a recipe, or --base and at least one --expert name=path")
        content: dict[str, Any] = {
            "base": {"path": base},
            "tasks": {name: {"expert": path} for name, path in pairs.items()},
        }
        return absolute_paths(parse_recipe(content, "flags"), Path.cwd())
    content = load_recipe(file).model_dump(exclude_unset=True)
    if base is not None:
        content["base"]["path"] = base
    for name, path in pairs.items():
        content["tasks"].setdefault(name, {})["expert"] = path
    return absolute_paths(parse_recipe(content, "flags"), Path.cwd())


def _pair(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise RecipeError(f"--expert {text}: expected name=path")
    return name, path
