"""Model families: one module each, found by its ``FAMILY``."""

import json
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.family import Block, Group, ModelFamily, MultiTaskModel
from epmq_deploy.models.head import TaskHead

__all__ = [
    "Block",
    "Group",
    "ModelFamily",
    "MultiTaskModel",
    "TaskHead",
    "families",
    "family_of",
]


def families() -> tuple[ModelFamily, ...]:
    """All families in this package."""
    modules = (import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__))
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_of(folder: Path) -> ModelFamily:
    """The family a Hugging Face folder belongs to.

    Raises:
        RecipeError: no ``config.json``, or a model type no family recognises.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise RecipeError(f"{folder}: no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise RecipeError(f"{config_file}: not JSON ({error})") from error
    for family in families():
        if family.recognises(config):
            return family
    known = ", ".join(family.name for family in families())
    raise RecipeError(
        f"{config_file}: model type {config.get('model_type')!r} is not supported; known: {known}"
    )
