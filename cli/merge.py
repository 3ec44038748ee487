"""``epmq merge``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from epmq_deploy.cli.flags import SEVERAL_HELP, with_flags
from epmq_deploy.cli.options import CommonOptions, PreflightFlag, needed
from epmq_deploy.errors import RecipeError
from epmq_deploy.options import refuse_repeated, split_entries
from epmq_deploy.recipe import (
    Recipe,
    absolute_paths,
    load_recipe,
    override,
    parse_recipe,
    with_preflight,
)
from epmq_deploy.registry import MERGE_METHODS


@with_flags(method.options for method in MERGE_METHODS.values())
def command(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; an existing one needs --overwrite."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: folder, hub id (owner/name@revision) or open_clip:NAME=PATH."
        ),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help=f"An expert as name=path, with a path as for --base; {SEVERAL_HELP}."),
    ] = None,
    list_methods: Annotated[
        bool, typer.Option("--list", help="List all merge methods and exit.")
    ] = False,
    preflight: PreflightFlag = None,
    *,
    common: CommonOptions,
    flags: dict[str, Any],
) -> None:
    """Merge experts into one Hugging Face folder.

    \b
    Examples:
      epmq merge recipe.yaml -o merged
      epmq merge recipe.yaml -o merged --method ties --density 0.1
      epmq merge --base clip --expert cars=clip-cars --expert sun=clip-sun -o merged
      epmq merge recipe.yaml -o merged --method iso_c --search
      epmq merge --list
    """
    terminal = common.terminal()
    if list_methods:
        from epmq_deploy.cli.listings import methods_data, methods_table
        from epmq_deploy.options.merging import MergeOptions

        sources = {name: method.source for name, method in MERGE_METHODS.items()}
        data = methods_data(MERGE_METHODS, MergeOptions, sources)
        terminal.result(data, methods_table("merge methods", data))
        return
    folder = needed(output, "--output")
    changed = override(_recipe(recipe, base, expert or []), "merge", flags)
    changed = with_preflight(changed, preflight)
    # After the recipe was read, so that a wrong one is refused at once.
    from epmq_deploy.cli.tables import stage_table
    from epmq_deploy.merging.stage import merge

    manifest = merge(
        changed,
        folder,
        overwrite=common.overwrite,
        device=common.torch_device(),
        progress=terminal,
    )
    data = {"output": str(folder), **manifest.reported}
    terminal.result(data, stage_table(manifest, str(folder)))


def _recipe(file: Path | None, base: str | None, experts: list[str]) -> Recipe:
    """Return the recipe of a file, of flags alone, or of both, in which case flags win."""
    pairs = [_named_path(text) for text in split_entries(experts, start=r"[\w-]+=")]
    try:
        refuse_repeated(name for name, _ in pairs)
    except ValueError as error:
        raise RecipeError(f"--expert: {error}") from error
    paths = dict(pairs)
    if file is None:
        if base is None or not paths:
            raise RecipeError("give a recipe, or --base and at least one --expert name=path")
        content: dict[str, Any] = {
            "base": {"path": base},
            "tasks": {name: {"expert": path} for name, path in paths.items()},
        }
        return absolute_paths(parse_recipe(content, "flags"), Path.cwd())
    content = load_recipe(file).model_dump(exclude_unset=True)
    if base is not None:
        content["base"]["path"] = base
    for name, path in paths.items():
        content["tasks"].setdefault(name, {})["expert"] = path
    return absolute_paths(parse_recipe(content, "flags"), Path.cwd())


def _named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise RecipeError(f"--expert {text}: expected name=path")
    return name, path
