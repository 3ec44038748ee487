"""Reading recipes: from YAML files or plain data, with paths made absolute."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from epmq_deploy.errors import RecipeError, listed
from epmq_deploy.recipe.messages import describe
from epmq_deploy.recipe.sections import DataSource, Head, Recipe


def parse_recipe(content: Any, source: str) -> Recipe:
    """Validate a recipe given as plain data.

    Args:
        content: mapping of sections.
        source: what to call it in error messages.

    Raises:
        RecipeError: names every wrong key, what was found and what is allowed.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(listed(source, describe(error))) from error


def parse_complete(content: Any, source: str) -> Recipe:
    """Validate a recipe with every value written out; default values count as not given."""
    recipe = parse_recipe(content, source)
    return parse_recipe(with_methods(recipe, recipe.model_dump(exclude_defaults=True)), source)


def load_recipe(file: str | Path) -> Recipe:
    """Read a recipe; relative paths in it are taken from its folder.

    Args:
        file: YAML.

    Raises:
        RecipeError: unreadable, no YAML, or invalid.
    """
    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    return absolute_paths(parse_recipe(content, str(file)), file.resolve().parent)


def absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Make every local path absolute, seen from ``folder``; hub ids stay as they are."""
    from epmq_deploy.checkpoints.hub import hub_id
    from epmq_deploy.checkpoints.open_clip_weights import PREFIX, split_named

    def local(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    def located(path: str) -> str:
        named = split_named(path)
        if named is not None:
            return f"{PREFIX}{named[0]}={local(named[1])}"
        # ``data/cars`` has the form of a hub id too; a folder of that first name decides.
        is_local = (folder / path).exists() or (folder / Path(path).parts[0]).is_dir()
        return path if hub_id(path) and not is_local else local(path)

    def source(data: DataSource | None) -> DataSource | None:
        return data and data.model_copy(update={"path": located(data.path)})

    def head(head: Head | None) -> Head | None:
        if head is None or head.matrix is None:
            return head
        return head.model_copy(update={"matrix": local(head.matrix)})

    tasks = {
        name: task.model_copy(
            update={
                "expert": located(task.expert),
                "calibration": source(task.calibration),
                "evaluation": source(task.evaluation),
                "head": head(task.head),
            }
        )
        for name, task in recipe.tasks.items()
    }
    base = recipe.base.model_copy(update={"path": located(recipe.base.path)})
    return recipe.model_copy(update={"base": base, "tasks": tasks})


def with_methods(recipe: Recipe, content: dict[str, Any]) -> dict[str, Any]:
    """Return ``content``, a recipe as plain data without some values, with its methods named."""
    for name in ("merge", "quantize"):
        content.setdefault(name, {})["method"] = getattr(recipe, name).method
    return content
