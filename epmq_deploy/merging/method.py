"""What a merge method is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import Field
from torch import Tensor

from epmq_deploy.options import Options


class MergeOptions(Options):
    """Options every merge method has."""

    method: str = Field(description="merge method")
    dtype: Literal["base", "float32", "float16", "bfloat16"] = Field(
        "base", description="dtype of the merged checkpoint; arithmetic is always float32"
    )
    mixed_dtypes: bool = Field(
        False, description="accept experts stored in another float dtype than the base"
    )


O = TypeVar("O", bound=MergeOptions)  # noqa: E741


class TaskVectors(Protocol):
    """All task vectors, streamed tensor by tensor from the checkpoints on every call."""

    @property
    def tasks(self) -> int:
        """Number of experts ``T``."""
        ...

    def of_task(self, index: int) -> Iterator[Tensor]:
        """One expert's task vector, tensor by tensor ``[*]``, float32."""
        ...

    def stacked(self) -> Iterator[Tensor]:
        """All experts' task vectors, tensor by tensor ``[T, *]``, float32."""
        ...


@dataclass(frozen=True)
class MergeMethod(Generic[O]):
    """A method: typed options, a pure function, and a global pass where it needs one.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: one line with the source.
        merge: ``(base [*], task_vectors [T, *], options, statistics) -> merged [*]``, float32.
        statistics: streaming passes over all task vectors for what must be known globally;
            its result is handed to every ``merge`` call.
    """

    options: type[O]
    summary: str
    merge: Callable[[Tensor, Tensor, O, Any], Tensor]
    statistics: Callable[[TaskVectors, O], Any] | None = None

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)
