"""Task vectors streamed from the experts' checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.checkpoints import Checkpoint


@dataclass(frozen=True)
class CheckpointTaskVectors:
    """The ``TaskVectors`` of experts on disk; one tensor's worth is in memory at a time.

    Attributes:
        base: the base model.
        experts: the experts by task.
        names: the tensors that are merged.
        device: where the task vectors are computed.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    names: Sequence[str]
    device: torch.device

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return tuple(self.experts)

    def size(self, name: str) -> int:
        """Number of parameters in a tensor."""
        return torch.Size(self.base.tensors[name].shape).numel()

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """One expert's task vector, tensor by tensor as in ``names``, float32."""
        expert = self.experts[self.tasks[index]]
        for name in names:
            start = self.of_base(name)
            vector = torch.empty_like(start)
            _subtract(expert, name, start, vector)
            yield vector

    def of_tensor(self, name: str) -> Tensor:
        """Task vectors ``[T, *]`` of one tensor, float32."""
        return self.with_base(name)[1]

    def with_base(self, name: str) -> tuple[Tensor, Tensor]:
        """The base's tensor ``[*]`` and its task vectors ``[T, *]``, float32."""
        start = self.of_base(name)
        vectors = start.new_empty((len(self.experts), *start.shape))
        for vector, expert in zip(vectors, self.experts.values(), strict=True):
            _subtract(expert, name, start, vector)
        return start, vectors

    def of_base(self, name: str) -> Tensor:
        """One of the base's tensors, float32."""
        start = torch.empty(self.base.tensors[name].shape, dtype=torch.float32, device=self.device)
        self.base.load_into(name, start)
        return start


def _subtract(expert: Checkpoint, name: str, start: Tensor, vector: Tensor) -> None:
    """Overwrite ``vector`` with what the expert adds to the base."""
    if name in expert.tensors:
        expert.load_into(name, vector)
        vector -= start
    else:
        # An optional tensor that an expert leaves out is the base's.
        vector.zero_()
