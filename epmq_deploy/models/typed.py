"""Families that ``config.json`` names by its ``model_type``."""

from pathlib import Path
from typing import Any

from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.loading import config_differences


class TypedFamily(ModelFamily):
    """Models recognised by ``model_type``, and compared by the settings that define them.

    Attributes:
        model_types: what ``model_type`` of a ``config.json`` may be.
        architecture: keys of ``config.json`` that define the merged model.
    """

    model_types: tuple[str, ...]
    architecture: tuple[str, ...]

    def recognises(self, config: dict[str, Any]) -> bool:
        """By model type."""
        return config.get("model_type") in self.model_types

    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Compares what defines the model."""
        return config_differences(self.architecture, base, expert)

    def check_config(self, folder: Path, config: dict[str, Any]) -> None:
        """Refuse variants that ``transformers`` would run, but not as this family takes them.

        Raises:
            RecipeError: it is one.
        """
