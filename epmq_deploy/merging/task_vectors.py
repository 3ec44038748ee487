"""Task vectors streamed from the experts' checkpoints."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.prefetch import ahead
from epmq_deploy.checkpoints.weight_scan import READERS
from epmq_deploy.merging.preflight import ExpertCheck


@dataclass(frozen=True)
class CheckpointTaskVectors:
    """The ``TaskVectors`` of experts on disk; two tensors' worth is in memory at a time.

    Threads read the next tensor while there is work on one.

    Attributes:
        base: the base model.
        experts: the experts by task.
        names: the tensors that are merged.
        device: where the task vectors are computed.
        check: of base and experts; every value is checked before it is used.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    names: Sequence[str]
    device: torch.device
    check: ExpertCheck

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return tuple(self.experts)

    def size(self, name: str) -> int:
        """Number of parameters in a tensor."""
        return torch.Size(self.base.tensors[name].shape).numel()

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """See ``TaskVectors``; begins to check the next expert."""
        expert, *later = tuple(self.experts.values())[index:]
        for other in later[:1]:
            self.check.ahead(other)
        base, *memory = (self._memory(names, 1) for _ in range(3))

        def vector(job: tuple[str, Tensor]) -> Tensor:
            name, place = job
            self._check(self.base, name)
            self._check(expert, name)
            start, found = self._first(base, name)[0], self._first(place, name)[0]
            self.base.load_into(name, start)
            _subtract(expert, name, start, found)
            return found

        yield from ahead(vector, zip(names, cycle(memory), strict=False), 1)

    def of_tensor(self, name: str) -> Tensor:
        """Task vectors ``[T, *]`` of one tensor, float32."""
        return self.with_base(name)[1]

    def with_base(self, name: str) -> tuple[Tensor, Tensor]:
        """The base's tensor ``[*]`` and its task vectors ``[T, *]``, float32."""
        return self._with_base(name, self._memory([name], len(self.experts) + 1), map)

    def with_bases(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """``with_base`` of each tensor in turn; both are valid until the next is taken."""
        memory = [self._memory(names, len(self.experts) + 1) for _ in range(2)]
        with ThreadPoolExecutor(READERS) as readers:
            yield from ahead(
                lambda job: self._with_base(*job, readers.map),
                zip(names, cycle(memory), strict=False),
                1,
            )

    def _with_base(
        self, name: str, memory: Tensor, apply: Callable[..., Iterator[None]]
    ) -> tuple[Tensor, Tensor]:
        """``with_base`` in memory that is there; ``apply`` does as ``map`` would."""
        experts = self.experts.values()
        stack = self._first(memory, name, len(experts) + 1)
        vectors, start = stack[:-1], stack[-1]
        # All at once, as this is what takes time; what was read is in the page cache.
        _all(apply(lambda checkpoint: self._check(checkpoint, name), (self.base, *experts)))
        self.base.load_into(name, start)
        _all(apply(lambda expert, place: _subtract(expert, name, start, place), experts, vectors))
        return start, vectors

    def _check(self, checkpoint: Checkpoint, name: str) -> None:
        if name in checkpoint.tensors:
            self.check.tensor(checkpoint, name)

    def _memory(self, names: Sequence[str], count: int) -> Tensor:
        """Room ``[n]`` for so many of any of these tensors.

        It is used again and again: new memory takes longer to get than to fill.
        """
        largest = max((self.size(name) for name in names), default=0)
        return torch.empty(count * largest, dtype=torch.float32, device=self.device)

    def _first(self, memory: Tensor, name: str, count: int = 1) -> Tensor:
        """The beginning of ``memory`` as a stack ``[count, *]`` of one tensor's shape."""
        shape = self.base.tensors[name].shape
        return memory[: count * self.size(name)].view(count, *shape)


def _all(results: Iterator[None]) -> None:
    """Let work be done that is only asked for."""
    deque(results, maxlen=0)


def _subtract(expert: Checkpoint, name: str, start: Tensor, vector: Tensor) -> None:
    """Overwrite ``vector`` with what the expert adds to the base."""
    if name in expert.tensors:
        expert.load_into(name, vector)
        vector -= start
    else:
        # An optional tensor that an expert leaves out is the base's.
        vector.zero_()
