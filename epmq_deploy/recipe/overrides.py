"""Overriding options of a recipe, as flags and keywords do."""

from typing import Any

from epmq_deploy.options import shared_fields
from epmq_deploy.recipe.reading import parse_recipe, with_methods
from epmq_deploy.recipe.sections import METHODS, Preflight, Recipe

# Options of quantization that say how many bits weights have.
_WAYS_TO_BITS = {"bits", "target_bits", "target_size"}


def override(recipe: Recipe, section: str, flags: dict[str, Any]) -> Recipe:
    """Replace options of one section; a new ``method`` keeps only what all methods share.

    Args:
        recipe: to start from.
        section: ``merge``, ``quantize``, ``export`` or ``eval``.
        flags: options by name; None means not given.

    Raises:
        RecipeError: an option the method does not have, or a value it does not allow.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if not given:
        return recipe
    # What was not given stays so: options that have no effect are refused where they were given.
    content = with_methods(recipe, recipe.model_dump(exclude_unset=True))
    options = content.get(section, {})
    if "target" in given:
        # A target brings formats of its own, unless some are given with it.
        options = options | {"formats": None}
    if not _WAYS_TO_BITS.isdisjoint(given):
        # One takes the place of the others, unless several are given.
        options = {key: value for key, value in options.items() if key not in _WAYS_TO_BITS}
    methods = METHODS.get(section, {})
    method = given.get("method")
    if isinstance(method, str) and method in methods and method != options["method"]:
        shared = shared_fields(methods[options["method"]].options, methods[method].options)
        options = {name: options[name] for name in options if name in shared - {"method"}}
    content[section] = options | given
    changed = parse_recipe(content, f"{section} options")
    # Drop recipe options that an override has made irrelevant instead of reporting them.
    if methods:
        before, after = (getattr(each, section).idle().keys() for each in (recipe, changed))
        idle = after - before - given.keys()
        if not idle.isdisjoint(content[section]):
            used = {key: value for key, value in content[section].items() if key not in idle}
            changed = parse_recipe(content | {section: used}, f"{section} options")
    return changed


def with_preflight(recipe: Recipe, preflight: Preflight | None) -> Recipe:
    """Return the recipe with another ``preflight``; None leaves it as it is.

    Raises:
        RecipeError: there is no such value.
    """
    if preflight is None:
        return recipe
    content = with_methods(recipe, recipe.model_dump(exclude_unset=True))
    return parse_recipe(content | {"preflight": preflight}, "options")
