"""Task vectors streamed from the experts' checkpoints."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.prefetch import ahead
from epmq_deploy.checkpoints.weight_scan import READERS


class ValueCheck(Protocol):
    """Checks values right before they are read, so that each file is read from disk once."""

    def check_tensor(self, checkpoint: Checkpoint, name: str) -> None:
        """Refuse a tensor that holds NaN or infinity; it is read next, from the page cache."""
        ...

    def check_soon(self, checkpoint: Checkpoint) -> None:
        """Begin in the background to check all tensors of a checkpoint; it is read next."""
        ...


@dataclass(frozen=True)
class CheckpointTaskVectors:
    """The ``TaskVectors`` of experts on disk; two tensors' worth is in memory at a time.

    Threads read the next tensor while the current one is being merged.

    Attributes:
        base: the base model.
        experts: the experts by task.
        names: the tensors that are merged.
        device: where the task vectors are computed.
        check: is called for every tensor of base and experts before it is read.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    names: Sequence[str]
    device: torch.device
    check: ValueCheck

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return tuple(self.experts)

    def size(self, name: str) -> int:
        """Return the number of parameters in a tensor."""
        return torch.Size(self.base.tensors[name].shape).numel()

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """Yield one expert's task vector, tensor by tensor ``[*]`` as in ``names``, float32.

        Each is valid until the next is taken. Also begins to check the next expert.
        """
        expert, *later = tuple(self.experts.values())[index:]
        for following in later[:1]:
            self.check.check_soon(following)
        base_buffer, *vector_buffers = (self._buffer(names, 1) for _ in range(3))

        def vector(job: tuple[str, Tensor]) -> Tensor:
            name, buffer = job
            self._check(self.base, name)
            self._check(expert, name)
            base, task_vector = self._stack(base_buffer, name)[0], self._stack(buffer, name)[0]
            self.base.load_into(name, base)
            _subtract(expert, name, base, task_vector)
            return task_vector

        yield from ahead(vector, zip(names, cycle(vector_buffers), strict=False), 1)

    def of_tensor(self, name: str) -> Tensor:
        """Return the task vectors ``[T, *]`` of one tensor, float32."""
        return self.with_base(name)[1]

    def with_base(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the base's tensor ``[*]`` and its task vectors ``[T, *]``, float32."""
        return self._with_base(name, self._buffer([name], len(self.experts) + 1), map)

    def with_bases(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``with_base`` of each tensor in turn; both are valid until the next is taken."""
        buffers = [self._buffer(names, len(self.experts) + 1) for _ in range(2)]
        with ThreadPoolExecutor(READERS) as readers:
            yield from ahead(
                lambda job: self._with_base(*job, readers.map),
                zip(names, cycle(buffers), strict=False),
                1,
            )

    def from_base(self, name: str) -> Tensor:
        """Return a tensor of the base that is not merged, in its stored dtype."""
        self._check(self.base, name)
        return self.base.load(name)

    def _with_base(
        self, name: str, buffer: Tensor, apply: Callable[..., Iterator[None]]
    ) -> tuple[Tensor, Tensor]:
        """``with_base`` in an existing buffer; ``apply`` is ``map`` or that of a thread pool."""
        experts = self.experts.values()
        stack = self._stack(buffer, name, len(experts) + 1)
        vectors, base = stack[:-1], stack[-1]
        # All files at once, because reading them takes the time; loading then hits the page cache.
        _exhaust(apply(lambda checkpoint: self._check(checkpoint, name), (self.base, *experts)))
        self.base.load_into(name, base)
        _exhaust(
            apply(lambda expert, vector: _subtract(expert, name, base, vector), experts, vectors)
        )
        return base, vectors

    def _check(self, checkpoint: Checkpoint, name: str) -> None:
        if name in checkpoint.tensors:
            self.check.check_tensor(checkpoint, name)

    def _buffer(self, names: Sequence[str], count: int) -> Tensor:
        """Allocate ``[n]``, large enough for ``count`` of any of these tensors.

        Buffers are reused because allocating costs more than filling.
        """
        largest = max((self.size(name) for name in names), default=0)
        return torch.empty(count * largest, dtype=torch.float32, device=self.device)

    def _stack(self, buffer: Tensor, name: str, count: int = 1) -> Tensor:
        """View the beginning of a buffer as a stack ``[count, *]`` of one tensor's shape."""
        shape = self.base.tensors[name].shape
        return buffer[: count * self.size(name)].view(count, *shape)


def _exhaust(results: Iterator[None]) -> None:
    """Exhaust an iterator for its side effects."""
    deque(results, maxlen=0)


def _subtract(expert: Checkpoint, name: str, base: Tensor, vector: Tensor) -> None:
    """Overwrite ``vector`` with the expert's tensor minus the base's."""
    if name in expert.tensors:
        expert.load_into(name, vector)
        vector -= base
    else:
        # An optional tensor that an expert leaves out is the base's.
        vector.zero_()
