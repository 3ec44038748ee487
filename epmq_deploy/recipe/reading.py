"""Reading recipes: from YAML files or plain data, with paths made absolute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from epmq_deploy.errors import RecipeError, listed
from epmq_deploy.options import YamlDocument, YamlError, read_yaml
from epmq_deploy.recipe.messages import booleans_for_numbers, describe, line_of
from epmq_deploy.recipe.paths import absolute, check_encoding, expanded
from epmq_deploy.recipe.sections import DataSource, Head, Recipe


def parse_recipe(content: Any, source: str) -> Recipe:
    """Validate a recipe given as plain data.

    Args:
        content: mapping of sections.
        source: what to call it in error messages.

    Raises:
        RecipeError: names every wrong key, what was found and what is allowed.
    """
    return _validated(content, source)


def _validated(content: Any, source: str, document: YamlDocument | None = None) -> Recipe:
    """Validate plain data; ``document``, where it came from one, knows the lines of its parts."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(listed(source, describe(error, document))) from error
    if problems := booleans_for_numbers(content, recipe.model_dump(), document):
        raise RecipeError(listed(source, problems))
    return recipe


def parse_complete(content: Any, source: str) -> Recipe:
    """Validate a recipe with every value written out; default values count as not given."""
    recipe = parse_recipe(content, source)
    return parse_recipe(with_methods(recipe, recipe.model_dump(exclude_defaults=True)), source)


def load_recipe(file: str | Path) -> Recipe:
    """Read a recipe; relative paths in it are taken from its folder.

    Values may refer to each other by YAML's anchors and merge keys; sections whose names begin with
    ``x-`` are there for these alone. Where text is expected, ``true`` and numbers are text.

    Args:
        file: YAML.

    Raises:
        RecipeError: unreadable, no YAML, or invalid; every problem with its line.
    """
    file = Path(file)
    check_encoding(file)
    document = _read_document(file)
    content = _sections(document.content)
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        not_text = [item["loc"] for item in error.errors() if item["type"] == "string_type"]
        content = _sections(document.with_text(not_text).content)
    recipe = _validated(content, str(file), document)
    return absolute_paths(recipe, absolute(file).parent, document, str(file))


def _read_document(file: Path) -> YamlDocument:
    """Read a YAML file.

    Raises:
        RecipeError: it cannot be read, or is not YAML.
    """
    if file.is_dir():
        names = sorted(each.name for each in file.iterdir() if each.suffix in (".yaml", ".yml"))
        instead = f"give a file in it ({', '.join(names)})" if names else "it holds no YAML file"
        raise RecipeError(f"{file}: a directory, not a recipe; {instead}")
    try:
        return read_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read ({error.strerror})") from error
    except YamlError as error:
        raise RecipeError(f"{file}: {error}") from error


def _sections(content: Any) -> Any:
    """Leave out what stands in a recipe only for anchors to refer to."""
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if not name.startswith("x-")}


def absolute_paths(
    recipe: Recipe, folder: Path, document: YamlDocument | None = None, source: str = "recipe"
) -> Recipe:
    """Make every local path absolute, seen from ``folder``; hub ids and links stay as they are.

    ``~``, ``$NAME`` and ``${NAME}`` in paths stand for the home folder and environment variables.

    Args:
        recipe: with paths as they are written.
        folder: that relative paths are seen from.
        document: that the recipe was read from; knows the lines of paths.
        source: what to call it in error messages.

    Raises:
        RecipeError: a variable is not set, or no file can have such a path; names every key.
    """
    from epmq_deploy.checkpoints.hub import hub_id
    from epmq_deploy.checkpoints.open_clip_weights import PREFIX, split_named

    problems: list[str] = []

    def local(path: str) -> str:
        check_encoding(Path(path))
        whole = absolute(folder / expanded(path, folder))
        check_encoding(whole)
        return str(whole)

    def located(path: str) -> str:
        named = split_named(path)
        if named is not None:
            return f"{PREFIX}{named[0]}={local(named[1])}"
        absolute = local(path)
        # ``data/cars`` has the form of a hub id too; a folder of that first name decides.
        is_local = (folder / path).exists() or any(
            (folder / part).is_dir() for part in Path(path).parts[:1]
        )
        return path if hub_id(path) and not is_local else absolute

    def checked(make_absolute: Callable[[str], str], path: str, *key: str) -> str:
        try:
            return make_absolute(path)
        except (ValueError, RecipeError) as error:
            problems.append(f"{line_of(document, key)}{'.'.join(key)}: {path!r}: {error}")
            return path

    def data(given: DataSource | None, *key: str) -> DataSource | None:
        if given is None:
            return None
        return given.model_copy(update={"path": checked(located, given.path, *key, "path")})

    def head(given: Head | None, *key: str) -> Head | None:
        if given is None or given.matrix is None:
            return given
        return given.model_copy(update={"matrix": checked(local, given.matrix, *key, "matrix")})

    tasks = {
        name: task.model_copy(
            update={
                "expert": checked(located, task.expert, "tasks", name, "expert"),
                "calibration": data(task.calibration, "tasks", name, "calibration"),
                "evaluation": data(task.evaluation, "tasks", name, "evaluation"),
                "head": head(task.head, "tasks", name, "head"),
            }
        )
        for name, task in recipe.tasks.items()
    }
    path = checked(located, recipe.base.path, "base", "path")
    if problems:
        raise RecipeError(listed(source, problems))
    base = recipe.base.model_copy(update={"path": path})
    return recipe.model_copy(update={"base": base, "tasks": tasks})


def with_methods(recipe: Recipe, content: dict[str, Any]) -> dict[str, Any]:
    """Return ``content``, a recipe as plain data without some values, with its methods named."""
    for name in ("merge", "quantize"):
        content.setdefault(name, {})["method"] = getattr(recipe, name).method
    return content
