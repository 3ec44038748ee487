"""Describing what is wrong with a recipe, in the user's words."""

from difflib import get_close_matches

from pydantic import (
    ValidationError,
)

from epmq_deploy.options import Options
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


def describe(error: ValidationError) -> list[str]:
    """Return one line per problem: the key, the value, what is allowed."""
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
        value = item["input"]
        shown = f", found {value!r}" if isinstance(value, str | int | float | bool) else ""
        lines.append(f"{key or 'recipe'}: {message}{shown}")
    return lines


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
