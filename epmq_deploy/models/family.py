"""What the rest of the library needs to know about a model family."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Linear layers that share their input.

    Attributes:
        layers: dotted names.
        norm: dotted name of the LayerNorm whose output that input is, where there is one.
    """

    layers: tuple[str, ...]
    norm: str | None = None

    def inside(self, block: str) -> "Group":
        """The group with names relative to ``block`` made absolute."""
        norm = None if self.norm is None else f"{block}.{self.norm}"
        return Group(tuple(f"{block}.{layer}" for layer in self.layers), norm)


@dataclass(frozen=True)
class Block:
    """One transformer block of the deployed model.

    Attributes:
        name: dotted module name, e.g. ``vision_model.encoder.layers.0``.
        groups: its linear layers, in the order they run.
    """

    name: str
    groups: tuple[Group, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """All linear layers, in the order they run."""
        return tuple(name for group in self.groups for name in group.layers)


class ModelFamily(ABC):
    """How to load, run and take apart the models of one architecture.

    Parameter names of the loaded model equal the tensor names of the checkpoint, so that one name
    means the same thing in merging, quantization and export.
    """

    name: ClassVar[str]
    input_names: ClassVar[tuple[str, ...]]
    modality: ClassVar[Literal["image", "text"]]

    @abstractmethod
    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a base's ``config.json`` belongs to this family."""

    @abstractmethod
    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Where an expert's ``config.json`` describes another architecture than the base's."""

    @abstractmethod
    def is_deployed(self, key: str) -> bool:
        """Whether a tensor of the base belongs to the part that is merged and deployed."""

    @abstractmethod
    def is_optional(self, key: str) -> bool:
        """Whether an expert may leave out a deployed tensor because it is the base's."""

    @abstractmethod
    def canonical_key(self, key: str) -> str:
        """The base checkpoint's name for an expert's tensor."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The part of the model that is merged, quantized and deployed, float32, eval mode."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """The blocks in the order they run, with the linear layers to quantize."""

    @abstractmethod
    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Features ``[batch, D]`` that heads multiply, from ``inputs`` as ``input_names``."""

    @abstractmethod
    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Turn raw samples (images, texts) into a batch of model inputs, as ``input_names``."""

    @abstractmethod
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Inputs of the right shapes for tracing, as ``input_names``."""

    def embedding_width(self, model: nn.Module, folder: Path) -> int:
        """``D`` of what ``embed`` returns."""
        with torch.inference_mode():
            return self.embed(model, *self.example_inputs(folder, 1)).shape[1]

    @abstractmethod
    def zero_shot_head(
        self,
        folder: Path,
        classes: Sequence[str],
        templates: Sequence[str],
        device: torch.device,
    ) -> Tensor:
        """Head ``[C, D]`` on the CPU from class names and prompt templates.

        Raises:
            RecipeError: the family has no text side to build a head with.
        """


class MultiTaskModel(nn.Module):
    """A backbone with one linear head per task: what gets exported and evaluated.

    Args:
        family: the backbone's family.
        backbone: as ``family.load`` returns it.
        heads: ``[C_t, D]`` per task.
    """

    def __init__(self, family: ModelFamily, backbone: nn.Module, heads: dict[str, Tensor]) -> None:
        super().__init__()
        self.family = family
        self.backbone = backbone
        self.tasks = tuple(heads)
        self.heads = nn.ParameterList(
            [nn.Parameter(head.to(torch.float32), requires_grad=False) for head in heads.values()]
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The embedding ``[batch, D]``, then logits ``[batch, C_t]`` in the order of ``tasks``."""
        embedding = self.family.embed(self.backbone, *inputs)
        return (embedding, *(embedding @ head.T for head in self.heads))
