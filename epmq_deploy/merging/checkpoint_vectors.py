"""Task vectors streamed from the experts' checkpoints."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.ahead import ahead
from epmq_deploy.checkpoints import Checkpoint

# Threads that read files, mostly waiting for the disk; more of them read no faster.
_READERS = 2


@dataclass(frozen=True)
class CheckpointTaskVectors:
    """The ``TaskVectors`` of experts on disk; two tensors' worth is in memory at a time.

    Threads read the next tensor while there is work on one.

    Attributes:
        base: the base model.
        experts: the experts by task.
        names: the tensors that are merged.
        device: where the task vectors are computed.
        wait_for: returns when an expert's values may be read.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    names: Sequence[str]
    device: torch.device
    wait_for: Callable[[str], None]

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return tuple(self.experts)

    def size(self, name: str) -> int:
        """Number of parameters in a tensor."""
        return torch.Size(self.base.tensors[name].shape).numel()

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """One expert's task vector, tensor by tensor as in ``names``, float32."""
        self.wait_for(self.tasks[index])
        expert = self.experts[self.tasks[index]]

        def vector(name: str) -> Tensor:
            start = self.of_base(name)
            found = torch.empty_like(start)
            _subtract(expert, name, start, found)
            return found

        yield from ahead(vector, names, _READERS)

    def of_tensor(self, name: str) -> Tensor:
        """Task vectors ``[T, *]`` of one tensor, float32."""
        return self.with_base(name)[1]

    def with_base(self, name: str) -> tuple[Tensor, Tensor]:
        """The base's tensor ``[*]`` and its task vectors ``[T, *]``, float32."""
        return self._with_base(name, map)

    def with_bases(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """``with_base`` of each tensor in turn."""
        with ThreadPoolExecutor(_READERS) as readers:
            yield from ahead(lambda name: self._with_base(name, readers.map), names, 1)

    def _with_base(self, name: str, apply: Callable[..., Iterator[None]]) -> tuple[Tensor, Tensor]:
        """``with_base``, whose reading ``apply`` does as ``map`` would."""
        for task in self.tasks:
            self.wait_for(task)
        start = self.of_base(name)
        vectors = start.new_empty((len(self.experts), *start.shape))

        def read(expert: Checkpoint, vector: Tensor) -> None:
            _subtract(expert, name, start, vector)

        deque(apply(read, self.experts.values(), vectors), maxlen=0)
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
