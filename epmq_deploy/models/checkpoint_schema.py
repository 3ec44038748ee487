"""What the checkpoints of a model family look like: which tensors they hold, under which names."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from epmq_deploy.checkpoints.tensors import Rename


class CheckpointSchema(ABC):
    """Which checkpoints belong to a family, and what each of their tensors is for.

    Attributes:
        tied: names under which checkpoints may hold a second copy of a tensor, to the first name.
    """

    tied: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a base's ``config.json`` belongs to this family."""

    @abstractmethod
    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Say where an expert's ``config.json`` describes another architecture than the base's."""

    def part_problems(self, tensors: Collection[str]) -> list[str]:
        """Say what the experts together lack for the merge, given the names of their tensors."""
        return []

    @abstractmethod
    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """Return the deployed model's name for a tensor of the base's or an expert's checkpoint.

        Several names where the stored tensor holds several of the deployed model's, in equal parts
        along its first dimension.
        """

    def expert_rename(self, config: dict[str, Any]) -> Rename:
        """Return ``canonical_key`` for an expert with this ``config.json``."""
        return self.canonical_key

    @abstractmethod
    def is_deployed(self, key: str) -> bool:
        """Whether a tensor of the base belongs to the part that is deployed."""

    def is_known(self, key: str) -> bool:
        """Whether base or experts may hold a tensor of this canonical name."""
        return self.is_deployed(key) or self.is_head(key)

    def is_merged(self, key: str) -> bool:
        """Whether a tensor of the base belongs to the part that is merged: by default, deployed."""
        return self.is_deployed(key)

    @abstractmethod
    def is_optional(self, key: str) -> bool:
        """Whether an expert may leave out a merged tensor because it is the base's."""

    def merged_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``config.json`` of a merged model, given the base's: by default, the same."""
        return dict(config)

    def is_head(self, key: str) -> bool:
        """Whether a tensor belongs to a task's head: kept per expert, never merged."""
        return False
