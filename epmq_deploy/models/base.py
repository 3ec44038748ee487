"""What the rest of the library needs to know about a model family."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.tensors import Rename
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import Block
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.tokens import TokenWeights


class ModelFamily(ABC):
    """How to load, run and take apart the models of one architecture.

    Parameter names of the loaded model equal the tensor names of the checkpoint, so that one name
    means the same thing in merging, quantization and export.
    """

    name: str
    input_names: tuple[str, ...]
    modality: Literal["image", "text"]
    experts_carry_heads: bool = False
    """Whether a task without ``head`` in the recipe takes what ``expert_head`` finds."""
    generates_text: bool = False
    """Whether tasks are answered in words; see ``epmq_deploy.models.text_generation.base``."""
    tied: Mapping[str, str] = MappingProxyType({})
    """Tensors that checkpoints may hold a copy of under a second name: that name to the first."""

    merges_text_tower: bool = False
    """Whether heads from class names differ between the merged model and its experts."""

    @property
    def task_type(self) -> str:
        """What the Hugging Face hub calls tasks of this kind."""
        return "text-generation" if self.generates_text else f"{self.modality}-classification"

    def merging(self, part: str | None) -> "ModelFamily":
        """The family that merges one part of the model, or its usual part when ``part`` is None.

        Raises:
            RecipeError: the family has no parts to choose from.
        """
        if part is None:
            return self
        raise RecipeError(
            f"base.part: {part}: models of the {self.name} family have no parts to choose from; "
            "leave it out"
        )

    @abstractmethod
    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a base's ``config.json`` belongs to this family."""

    @abstractmethod
    def config_problems(self, base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
        """Where an expert's ``config.json`` describes another architecture than the base's."""

    @abstractmethod
    def is_deployed(self, key: str) -> bool:
        """Whether a tensor of the base belongs to the part that is deployed."""

    def is_merged(self, key: str) -> bool:
        """Whether a tensor of the base belongs to the part that is merged: what is deployed."""
        return self.is_deployed(key)

    def part_problems(self, held: Collection[str]) -> list[str]:
        """What the experts together lack to be merged as asked, given the tensors they hold."""
        return []

    @abstractmethod
    def is_optional(self, key: str) -> bool:
        """Whether an expert may leave out a merged tensor because it is the base's."""

    def is_head(self, key: str) -> bool:
        """Whether a tensor belongs to a task's head: kept per expert, never merged."""
        return False

    @abstractmethod
    def canonical_key(self, key: str) -> str | tuple[str, ...]:
        """The deployed model's name for a tensor of the base's or an expert's checkpoint.

        Several names where the stored tensor holds several of the deployed model's, in equal parts
        along its first dimension.
        """

    def expert_rename(self, config: dict[str, Any]) -> Rename:
        """``canonical_key`` for an expert with this ``config.json``."""
        return self.canonical_key

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The part of the model that is merged, quantized and deployed, float32, eval mode."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        """The blocks in the order they run, with the linear layers to quantize."""

    def tokens(self, *inputs: Tensor, stream: str = "") -> TokenWeights:
        """Which tokens of a batch of model inputs are real, and which one the heads read.

        Args:
            inputs: as ``input_names``.
            stream: of a block or group.
        """
        return TokenWeights()

    @abstractmethod
    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Features ``[batch, D]`` that heads take, from ``inputs`` as ``input_names``."""

    def predictions(self, *inputs: Tensor) -> Tensor:
        """How many rows of ``embed`` belong to each sample, int64 ``[batch]``, on the CPU."""
        return torch.ones(len(inputs[0]), dtype=torch.int64)

    @abstractmethod
    def collate(self, folder: Path, samples: Sequence[Any]) -> tuple[Tensor, ...]:
        """Turn raw samples (images, texts) into a batch of model inputs, as ``input_names``."""

    @abstractmethod
    def example_inputs(self, folder: Path, batch: int) -> tuple[Tensor, ...]:
        """Inputs of the right shapes for tracing, as ``input_names``."""

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Names of the axes that exported graphs leave open, per input as ``input_names``."""
        return tuple({0: "batch"} for _ in self.input_names)

    def embedding_width(self, model: nn.Module, folder: Path) -> int:
        """``D`` of what ``embed`` returns."""
        device = next(model.parameters()).device
        inputs = (value.to(device) for value in self.example_inputs(folder, 1))
        with torch.inference_mode():
            return self.embed(model, *inputs).shape[1]

    def expert_head(self, expert: Checkpoint) -> TaskHead | None:
        """The head an expert's checkpoint holds; None where it holds none.

        Args:
            expert: opened with ``canonical_key``.

        Raises:
            RecipeError: a part of it is missing.
        """
        return None

    def zero_shot_head(
        self,
        folder: Path,
        classes: Sequence[str],
        templates: Sequence[str],
        device: torch.device,
        expert: Checkpoint | None = None,
    ) -> Tensor:
        """Head ``[C, D]`` on the CPU from class names and prompt templates.

        Args:
            folder: the model's.
            classes: their names.
            templates: of prompts; ``{}`` is replaced by the name.
            device: where to run.
            expert: whose head it is to be, where not the model's own.

        Raises:
            RecipeError: the family has no text side to build a head with.
        """
        raise RecipeError(
            f"the {self.name} family has no head for class names; leave out head to take the "
            "expert's classifier, or give a matrix"
        )


class Deployable(nn.Module, ABC):
    """What becomes one graph.

    Attributes:
        stem: begins the name of the graph's file.
        backbone: holds the layers, by dotted name.
    """

    stem: ClassVar[str] = "model"
    backbone: nn.Module

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """As ``forward`` takes them."""

    @property
    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """As ``forward`` gives them."""

    @abstractmethod
    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Names of the axes that the graph leaves open, per input as ``input_names``."""

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
        """The family's."""
        return self.family.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """``embedding`` and ``logits_<task>``."""
        return ("embedding", *(f"logits_{task}" for task in self.tasks))

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """The family's."""
        return self.family.dynamic_axes()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The embedding ``[batch, D]``, then logits ``[batch, C_t]`` in the order of ``tasks``."""
        embedding = self.family.embed(self.backbone, *inputs)
        return (embedding, *(head(embedding) for head in self.heads))
