"""Describing what is wrong with a recipe, in the user's words."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import (
    ValidationError,
)

from epmq_deploy.options import Options, YamlDocument
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.recipe.sections import (
    METHODS,
    Base,
    DataSource,
    EvalOptions,
    ExportOptions,
    Head,
    Recipe,
    Task,
)


def describe(error: ValidationError, document: YamlDocument | None = None) -> list[str]:
    """Return one sentence per problem: the line, the key, the value, what is allowed.

    Args:
        error: as pydantic raised it.
        document: that was validated, where it came from a file.
    """
    lines = []
    for item in error.errors():
        # Members of a union appear in the location by their tag; the user's file has no such key.
        tags = {name for methods in METHODS.values() for name in methods}
        path = item["loc"]
        tagged = len(path) > 1 and path[0] in ("merge", "quantize") and path[1] in tags
        key = ".".join(str(part) for part in (path[:1] + path[2:] if tagged else path))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            keys = _allowed_keys(path)
            message = f"no such option; allowed here: {', '.join(keys)}"
            if close := get_close_matches(str(path[-1]), keys, n=1):
                message += f"; did you mean {close[0]}?"
        elif item["type"] == "model_type":
            message = "must be a mapping of options"
        elif item["type"] == "union_tag_invalid":
            names = item["ctx"]["expected_tags"].replace("'", "")
            message = f"unknown method {item['ctx']['tag']!r}; choose from {names}"
            key = f"{key}.method"
        elif item["type"] == "string_type" and item["input"] is None:
            message = "nothing is given; put ~ and null in quotes where they are text"
        value = item["input"]
        shown = f", found {value!r}" if isinstance(value, str | int | float | bool) else ""
        lines.append(f"{line_of(document, path)}{key or 'recipe'}: {message}{shown}")
    return lines


def line_of(document: YamlDocument | None, path: Sequence[str | int]) -> str:
    """Return a sentence's beginning that says where a key is; empty where that is not known."""
    line = document and document.line(path)
    return f"line {line}: " if line else ""


def booleans_for_numbers(
    given: Any, options: Any, document: YamlDocument | None, path: tuple[str | int, ...] = ()
) -> list[str]:
    """Return one sentence per boolean that pydantic took for the number 1 or 0.

    Args:
        given: plain data.
        options: what became of it, as plain data.
        document: as for ``describe``.
        path: of ``given``.
    """
    if isinstance(given, bool) and type(options) in (int, float):
        key = ".".join(map(str, path))
        return [f"{line_of(document, path)}{key}: must be a number, found {given}"]
    parts: Iterable[tuple[str | int, Any, Any]] = ()
    if isinstance(given, Mapping) and isinstance(options, Mapping):
        parts = ((key, value, options.get(key)) for key, value in given.items())
    elif isinstance(given, list | tuple) and isinstance(options, list | tuple):
        parts = zip(range(len(given)), given, options, strict=False)
    return [
        text
        for part, value, option in parts
        for text in booleans_for_numbers(value, option, document, (*path, part))
    ]


def _allowed_keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the section that an unknown key is in."""
    if len(path) == 1:
        return list(Recipe.model_fields)
    if path[0] in METHODS:
        return list(METHODS[str(path[0])][str(path[1])].options.model_fields)
    models: dict[str, type[Options]] = {
        "base": Base,
        "tasks": Task,
        "calibration": DataSource,
        "evaluation": DataSource,
        "head": Head,
        "prompt": Prompt,
        "export": ExportOptions,
        "eval": EvalOptions,
    }
    section = next(part for part in reversed(path[:-1]) if part in models)
    return list(models[str(section)].model_fields)
