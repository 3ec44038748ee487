"""Model families: what the rest of the library knows about architectures.

A family is one file with a ``FAMILY``. It answers four questions, each an abstract class in a file
of its own: what checkpoints look like (``CheckpointSchema``), how the network is loaded, run and
taken apart (``Network``), how samples become inputs (``ModelInputs``) and where heads come from
(``HeadSource``). ``encoders`` and ``text_generation`` answer most of them for all families of their
kind; ``generic`` answers them for encoders without a family by running the model once. What is
exported is a ``Deployable``.
"""

from collections.abc import Collection
from pathlib import Path

from epmq_deploy.checkpoints.files import usable_settings
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.decoder_use import classifies, is_classifier
from epmq_deploy.models.deployable import Deployable, MultiTaskModel
from epmq_deploy.models.generic.family import generic_family
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.loading import model_type_of, read_config
from epmq_deploy.models.text_generation.base import TextGenerationFamily
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
    """Return all families except the generic one."""
    return tuple(MODEL_FAMILIES.values())


def family_of(folder: Path, experts: Collection[ModelFolder] = ()) -> ModelFamily:
    """Return the family that a Hugging Face folder belongs to.

    Args:
        folder: of the base, or of what was made from it.
        experts: folders of the base's experts: classifiers make a decoder one, too, and their
            settings of heads count.

    Raises:
        RecipeError: no ``config.json``, one without a model type, or one that no family recognises
            and the generic one cannot take apart.
    """
    config = read_config(folder)
    with usable_settings(folder):
        for family in families():
            if not family.recognises(config):
                continue
            if not isinstance(family, TextGenerationFamily):
                return family
            if family.encoder_decoder is None:
                if is_classifier(ModelFolder.at(folder), config, experts):
                    break
            elif any(map(classifies, experts)):
                raise RecipeError(
                    f"{folder}: its experts are classifiers of texts, but models of the "
                    f"{family.name} family are taken to generate texts; fine-tune them to answer "
                    "in text"
                )
            return family
        model_type_of(folder, config)
        return generic_family(folder, experts)
