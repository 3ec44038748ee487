"""Base classes of model families."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.checkpoint_schema import CheckpointSchema
from epmq_deploy.models.head import embedding_width
from epmq_deploy.models.head_source import HeadSource
from epmq_deploy.models.inputs import ModelInputs
from epmq_deploy.models.loading import config_differences
from epmq_deploy.models.network import Network


class ModelFamily(CheckpointSchema, Network, ModelInputs, HeadSource):
    """The models of one architecture.

    A family says four things, each an abstract class of its own: what its checkpoints look like
    (``CheckpointSchema``), how its network runs (``Network``), how samples become its inputs
    (``ModelInputs``) and where its heads come from (``HeadSource``).
    """

    @property
    def task_type(self) -> str:
        """Return what the Hugging Face hub calls tasks of this kind."""
        return f"{self.modality}-classification"

    def merging(self, part: str | None) -> "ModelFamily":
        """Return the family that merges one part of the model; None stands for its usual part.

        Raises:
            RecipeError: the family has no parts to choose from.
        """
        if part is None:
            return self
        raise RecipeError(
            f"base.part: {part}: models of the {self.name} family have no parts to choose from; "
            "leave it out"
        )

    def embedding_width(self, model: nn.Module, folder: Path) -> int:
        """Return ``D``, the width that heads take; see ``TaskHead``."""
        device = next(model.parameters()).device
        inputs = (value.to(device) for value in self.example_inputs(folder, 1))
        with torch.inference_mode():
            return embedding_width(self.embed(model, *inputs))


class TypedFamily(ModelFamily):
    """Models recognised by ``model_type``, and compared by the settings that define them.

    Attributes:
        model_types: what ``model_type`` of a ``config.json`` may be.
        architecture: keys of ``config.json`` that define the merged model.
    """

    model_types: tuple[str, ...]
    architecture: tuple[str, ...]

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether the config has one of the family's model types."""
        return config.get("model_type") in self.model_types

    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Compare the keys of ``architecture``."""
        return config_differences(self.architecture, base, expert)

    def check_config(self, folder: Path, config: dict[str, Any]) -> None:
        """Refuse variants that ``transformers`` would run, but not as this family takes them.

        Raises:
            RecipeError: it is one.
        """
