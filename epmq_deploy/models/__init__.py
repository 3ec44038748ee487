"""Model families: one module each, found by its ``FAMILY``."""

from pathlib import Path

from epmq_deploy.models.base import Deployable, ModelFamily, MultiTaskModel
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.generic.family import generic_family
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.loading import read_config
from epmq_deploy.registry import Registry

MODEL_FAMILIES: Registry[ModelFamily] = Registry(
    "model family", __name__, "FAMILY", "epmq_deploy.model_families"
)

__all__ = [
    "MODEL_FAMILIES",
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
    """All families but the generic one."""
    return tuple(MODEL_FAMILIES.values())


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
