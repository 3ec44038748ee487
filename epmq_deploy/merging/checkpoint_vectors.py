"""Task vectors streamed from the experts' checkpoints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.checkpoints import Checkpoint


@dataclass(frozen=True)
class CheckpointTaskVectors:
    """The ``TaskVectors`` of experts on disk; one tensor's worth is in memory at a time.

    Attributes:
        base: the base model.
        experts: the experts, in task order.
        names: the tensors that are merged.
        device: where the task vectors are computed.
    """

    base: Checkpoint
    experts: Sequence[Checkpoint]
    names: Sequence[str]
    device: torch.device

    @property
    def tasks(self) -> int:
        """Number of experts."""
        return len(self.experts)

    def of_task(self, index: int) -> Iterator[Tensor]:
        """One expert's task vector, tensor by tensor, float32."""
        for name in self.names:
            yield self._task_vector(self.experts[index], name)

    def stacked(self) -> Iterator[Tensor]:
        """All experts' task vectors, tensor by tensor ``[T, *]``, float32."""
        for name in self.names:
            yield self.of_tensor(name)

    def of_tensor(self, name: str) -> Tensor:
        """Task vectors ``[T, *]`` of one tensor, float32."""
        return torch.stack([self._task_vector(expert, name) for expert in self.experts])

    def _task_vector(self, expert: Checkpoint, name: str) -> Tensor:
        start = self.loaded(self.base, name)
        # An optional tensor that an expert leaves out is the base's.
        return self.loaded(expert, name) - start if name in expert.tensors else start - start

    def loaded(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """One tensor, float32, on the device."""
        return checkpoint.load(name).to(self.device, torch.float32)
