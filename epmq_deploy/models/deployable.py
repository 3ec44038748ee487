"""The modules that become exported graphs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.embedding_head import EmbeddingHead
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.pooling import pooled
from epmq_deploy.models.problem_types import EMBEDDING, READING_TOKENS, TOKEN
from epmq_deploy.recipe import ProblemType

# Name of the input that numbers the task of each sample, int64 ``[batch]``, where layers have
# corrections for tasks.
TASK_INPUT = "task"


def output_of(task: str, kind: ProblemType) -> str:
    """Return the name of a task's output: of logits, or of an embedding."""
    return f"{'embedding' if kind == EMBEDDING else 'logits'}_{task}"


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
        self._kinds = {task: head.problem_type for task, head in heads.items()}

    def replace_heads(self, heads: Mapping[str, TaskHead]) -> None:
        """Take other heads, of the same kind and size, for the tasks given."""
        for number, task in enumerate(self.tasks):
            if task in heads:
                self.heads[number] = heads[task]

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the family's input names."""
        return self.family.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return ``embedding``, and each task's output."""
        return ("embedding", *(output_of(task, kind) for task, kind in self._kinds.items()))

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Return the family's open axes."""
        return self.family.dynamic_axes()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the embedding ``[batch, D]``, then logits ``[batch, C_t]`` as ``tasks``.

        Those of tasks that label words are ``[batch, T, C_t]``; tasks that embed texts give their
        own embedding, ``[batch, E_t]``.
        """
        if not any(kind in READING_TOKENS for kind in self._kinds.values()):
            embedding = self.family.embed(self.backbone, *inputs)
            return (embedding, *(head(embedding) for head in self.heads))
        states = self.family.token_states(self.backbone, *inputs)
        embedding = self.family.pool(states, *inputs)
        mask = inputs[self.input_names.index("attention_mask")]

        def read(head: TaskHead) -> Tensor:
            if isinstance(head, EmbeddingHead):
                return pooled(states, mask, head.settings.pooling)
            return states if head.problem_type == TOKEN else embedding

        return (embedding, *(head(read(head)) for head in self._typed_heads()))

    def _typed_heads(self) -> Iterator[TaskHead]:
        for head in self.heads:
            assert isinstance(head, TaskHead)
            yield head
