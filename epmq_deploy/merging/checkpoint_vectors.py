"""Task vectors streamed from the experts' checkpoints."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from epmq_deploy.ahead import ahead
from epmq_deploy.checkpoints import Checkpoint
from epmq_deploy.merging.preflight import ExpertCheck

# Threads that read and check files; more of them read no faster.
_READERS = 4


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
        largest = max((self.size(name) for name in names), default=0)
        # New memory for every tensor would take longer to get than to fill.
        base, *memory = (torch.empty(largest, device=self.device) for _ in range(3))

        def vector(job: tuple[str, Tensor]) -> Tensor:
            name, place = job
            start = self.of_base(name, base)
            found = _first(place, start.shape)
            self._read(expert, name, start, found)
            return found

        yield from ahead(vector, zip(names, cycle(memory), strict=False), 1)

    def of_tensor(self, name: str) -> Tensor:
        """Task vectors ``[T, *]`` of one tensor, float32."""
        return self.with_base(name)[1]

    def with_base(self, name: str) -> tuple[Tensor, Tensor]:
        """The base's tensor ``[*]`` and its task vectors ``[T, *]``, float32."""
        return self._with_base(name, map)

    def with_bases(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """``with_base`` of each tensor in turn, until the next is asked for."""
        count = len(self.experts) * max((self.size(name) for name in names), default=0)
        memory = tuple(torch.empty(count, device=self.device) for _ in range(2))

        def read(job: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
            name, place = job
            return self._with_base(name, readers.map, place)

        with ThreadPoolExecutor(_READERS) as readers:
            yield from ahead(read, zip(names, cycle(memory), strict=False), 1)

    def _with_base(
        self, name: str, apply: Callable[..., Iterator[None]], memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``with_base``, whose reading ``apply`` does as ``map`` would."""
        start = self.of_base(name)
        shape = (len(self.experts), *start.shape)
        vectors = start.new_empty(shape) if memory is None else _first(memory, shape)

        def read(expert: Checkpoint, vector: Tensor) -> None:
            self._read(expert, name, start, vector)

        deque(apply(read, self.experts.values(), vectors), maxlen=0)
        return start, vectors

    def of_base(self, name: str, memory: Tensor | None = None) -> Tensor:
        """One of the base's tensors, float32; in ``memory [n]`` if there is any."""
        self.check.tensor(self.base, name)
        shape = self.base.tensors[name].shape
        start = torch.empty(shape, device=self.device) if memory is None else _first(memory, shape)
        self.base.load_into(name, start)
        return start

    def _read(self, expert: Checkpoint, name: str, start: Tensor, vector: Tensor) -> None:
        if name in expert.tensors:
            self.check.tensor(expert, name)
        _subtract(expert, name, start, vector)


def _first(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of ``memory [n]`` as a tensor of a shape."""
    return memory[: torch.Size(shape).numel()].view(shape)


def _subtract(expert: Checkpoint, name: str, start: Tensor, vector: Tensor) -> None:
    """Overwrite ``vector`` with what the expert adds to the base."""
    if name in expert.tensors:
        expert.load_into(name, vector)
        vector -= start
    else:
        # An optional tensor that an expert leaves out is the base's.
        vector.zero_()
