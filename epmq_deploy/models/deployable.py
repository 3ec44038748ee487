"""The modules that become exported graphs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.head import TaskHead


class Deployable(nn.Module, ABC):
    """A module that becomes one graph.

    Attributes:
        stem: begins the name of the graph's file.
        backbone: holds the layers, by dotted name.
    """

    stem: ClassVar[str] = "model"
    backbone: nn.Module

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """Return the names of the inputs, as ``forward`` takes them."""

    @property
    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """Return the names of the outputs, as ``forward`` returns them."""

    @abstractmethod
    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Return the axes that the graph leaves open, with names, as ``input_names``."""

    def runs(self, layer: str) -> bool:
        """Whether a layer, by the backbone's dotted name, is part of the graph."""
        return True


class MultiTaskModel(Deployable):
    """A backbone with one head per task: what gets exported and evaluated.

    Args:
        family: the backbone's family.
        backbone: as ``family.load`` returns it.
        heads: per task, from embeddings ``[batch, D]`` to logits ``[batch, C_t]``.
    """

    def __init__(
        self, family: ModelFamily, backbone: nn.Module, heads: Mapping[str, TaskHead]
    ) -> None:
        super().__init__()
        self.family = family
        self.backbone = backbone
        self.tasks = tuple(heads)
        self.heads = nn.ModuleList(heads.values())

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the family's input names."""
        return self.family.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return ``embedding`` and ``logits_<task>``."""
        return ("embedding", *(f"logits_{task}" for task in self.tasks))

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Return the family's open axes."""
        return self.family.dynamic_axes()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the embedding ``[batch, D]``, then logits ``[batch, C_t]`` as ``tasks``."""
        embedding = self.family.embed(self.backbone, *inputs)
        return (embedding, *(head(embedding) for head in self.heads))
