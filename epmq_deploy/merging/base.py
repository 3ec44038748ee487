"""What a merge method is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from epmq_deploy.merging.calibrated import Calibrated, CalibrationData
from epmq_deploy.options.merging import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor

# Parameters that elementwise methods take at a time: temporaries of 20 tasks stay in the cache.
CHUNK = 2**15


def pieces(values: Tensor) -> Iterator[Tensor]:
    """``values [T, *]`` cut into ``[T, n]`` with ``n`` at most ``CHUNK``, in order."""
    flat = values.reshape(len(values), -1)
    for first in range(0, flat.shape[1], CHUNK):
        yield flat[:, first : first + CHUNK]


O = TypeVar("O", bound=MergeOptions)  # noqa: E741


class TaskVectors(Protocol):
    """All task vectors, streamed tensor by tensor from the checkpoints on every call."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the ``T`` experts."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors."""
        ...

    def size(self, name: str) -> int:
        """Number of parameters in a tensor."""
        ...

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """One expert's task vector, tensor by tensor ``[*]`` as in ``names``, float32.

        Each is valid until the next is taken.
        """
        ...

    def of_tensor(self, name: str) -> Tensor:
        """All experts' task vectors of one tensor ``[T, *]``, float32."""
        ...


@dataclass(frozen=True)
class Context:
    """What a method may know of the tensor it merges beside its values.

    Attributes:
        name: of the tensor.
        tasks: names of the experts, in the order of the task vectors.
        statistics: what the method's global pass, or its pass over calibration data, found.
    """

    name: str
    tasks: Sequence[str]
    statistics: Any = None


@dataclass(frozen=True)
class MergeMethod(Generic[O]):
    """A method: typed options, a pure function, and a global pass where it needs one.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: what it does, in one line.
        source: where it is published.
        merge: ``(base [*], task_vectors [T, *], options, context) -> merged [*]``, float32; changes
            none of its arguments.
        statistics: streaming passes over all task vectors for what must be known globally;
            its result is handed to every ``merge`` call.
        calibrate: pass over calibration data, instead of ``statistics``; its result is handed to
            every ``merge`` call likewise. Options are ``DataOptions``.
        needs_heads: whether ``calibrate`` needs the tasks' heads.
        elementwise: whether each parameter is merged without regard to the others of its tensor.
        check: one sentence for each thing in the options that does not fit these tasks.
    """

    options: type[O]
    summary: str
    source: str
    merge: Callable[[Tensor, Tensor, O, Context], Tensor]
    statistics: Callable[[TaskVectors, O], Any] | None = None
    calibrate: Callable[[CalibrationData, TaskVectors, O], Calibrated] | None = None
    needs_heads: bool = False
    elementwise: bool = False
    check: Callable[[O, Sequence[str]], list[str]] | None = None

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)

    def problems(self, options: O, tasks: Sequence[str]) -> list[str]:
        """One sentence for each thing in the options that does not fit these tasks."""
        check = self.check
        if check is None:
            return []
        found = [text for variant in options.variants() for text in check(variant, tasks)]
        return list(dict.fromkeys(found))

    def merge_tensor(
        self, base: Tensor, task_vectors: Tensor, options: O, context: Context
    ) -> Tensor:
        """``merge`` with the options of this tensor, elementwise methods in pieces.

        Args:
            base: ``[*]``, float32.
            task_vectors: ``[T, *]``, float32.
            options: of the whole model.
            context: of the tensor.
        """
        own = options.for_tensor(context.name)
        if not self.elementwise or base.numel() <= CHUNK:
            return self.merge(base, task_vectors, own, context)
        # Written in place: results kept between temporaries would tear the memory into pieces.
        merged = base.new_empty(base.shape)
        parts = zip(pieces(base[None]), pieces(task_vectors), pieces(merged[None]), strict=True)
        for start, vectors, result in parts:
            result[0] = self.merge(start[0], vectors, own, context)
        return merged
