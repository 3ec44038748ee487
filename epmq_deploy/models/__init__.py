"""Model families: one module each, found by its ``FAMILY``."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from epmq_deploy.models.family import Block, Deployable, Group, ModelFamily, MultiTaskModel
from epmq_deploy.models.generic import generic_family
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.loading import read_config

__all__ = [
    "Block",
    "Deployable",
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
        RecipeError: no ``config.json``, or a model type that no family recognises and the generic
            one cannot take apart.
    """
    config = read_config(folder)
    for family in families():
        if family.recognises(config):
            return family
    return generic_family(folder)
