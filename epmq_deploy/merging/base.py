"""What a merge method is, and what it is given.

A method is a ``MergeMethod``: option model, description and one function that merges a tensor. If
the function needs more than the tensor, the method also says how to compute that: from all task
vectors (``FromTaskVectors``) or by running models on calibration data (``FromData``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from epmq_deploy.options.merging import DataOptions, MergeOptions, ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_deploy.calibration.block_runner import ModuleSource
    from epmq_deploy.models import ModelFamily
    from epmq_deploy.models.predictions import PredictedLogits
    from epmq_deploy.progress import Progress

# Parameters that elementwise methods take at a time: temporaries of 20 tasks stay in the cache.
CHUNK = 2**15

OptionsT = TypeVar("OptionsT", bound=MergeOptions)
StatisticsT = TypeVar("StatisticsT")


def pieces(values: Tensor) -> Iterator[Tensor]:
    """Cut ``values [T, *]`` into ``[T, n]`` with ``n`` at most ``CHUNK``, in order."""
    flat = values.reshape(len(values), -1)
    for first in range(0, flat.shape[1], CHUNK):
        yield flat[:, first : first + CHUNK]


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
        """Return the number of parameters in a tensor."""
        ...

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """Yield one expert's task vector, tensor by tensor ``[*]`` as in ``names``, float32.

        Each is valid until the next is taken.
        """
        ...

    def of_tensor(self, name: str) -> Tensor:
        """Return all experts' task vectors of one tensor ``[T, *]``, float32."""
        ...


class CalibrationData(Protocol):
    """Calibration samples of every task, and the models to run on them."""

    @property
    def family(self) -> ModelFamily:
        """Family of base and experts."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        ...

    @property
    def experts(self) -> ModuleSource:
        """The experts, on the device; each is valid until the next is asked for."""
        ...

    @property
    def progress(self) -> Progress:
        """Shows the progress of a long pass."""
        ...

    def batches(self, task: str, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield a task's model inputs, at most ``size`` samples at a time, on the device."""
        ...

    def predictions(
        self, task: str, model: nn.Module, inputs: tuple[Tensor, ...]
    ) -> PredictedLogits:
        """Return a model's predictions for a batch of a task; only for methods that need heads."""
        ...

    def backbone(self) -> nn.Module:
        """Return a new model with the base's weights, float32, on the device."""
        ...


@dataclass(frozen=True)
class Calibrated(Generic[StatisticsT]):
    """The result of a pass over calibration data.

    Attributes:
        statistics: given to every call of ``merge``.
        details: plain data for the manifest.
    """

    statistics: StatisticsT
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FromTaskVectors(Generic[OptionsT, StatisticsT]):
    """Statistics of all task vectors together, computed before any tensor is merged.

    Attributes:
        compute: makes streaming passes over the task vectors.
    """

    compute: Callable[[TaskVectors, OptionsT], StatisticsT]


@dataclass(frozen=True)
class FromData(Generic[OptionsT, StatisticsT]):
    """Statistics of models run on calibration data; options are ``DataOptions``.

    Attributes:
        compute: runs experts, one in memory at a time, or a model that is being merged.
        needs_heads: whether it compares predictions, for which classifiers need heads.
    """

    compute: Callable[[CalibrationData, TaskVectors, OptionsT], Calibrated[StatisticsT]]
    needs_heads: bool = False


@dataclass(frozen=True)
class Context(Generic[StatisticsT]):
    """What a method may know of the tensor it merges in addition to its values.

    Attributes:
        name: of the tensor.
        tasks: names of the experts, in the order of the task vectors.
        statistics: as the method's ``statistics`` computed them; None for methods without.
    """

    name: str
    tasks: Sequence[str]
    statistics: StatisticsT


@dataclass(frozen=True)
class MergeMethod(Generic[OptionsT, StatisticsT]):
    """A merge method.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: what it does, in one line.
        source: where it is published.
        merge: ``(base [*], task_vectors [T, *], options, context) -> merged [*]``, float32; options
            are those of the tensor. Changes none of its arguments.
        statistics: how ``context.statistics`` is computed; None for methods that need none.
        elementwise: whether each parameter is merged independently of the others of its tensor.
            ``merge`` is then given flat parts of the tensor: ``base [n]``, ``task_vectors [T, n]``.
        check: returns one sentence for each problem of the options with these tasks.
    """

    options: type[OptionsT]
    summary: str
    source: str
    merge: Callable[[Tensor, Tensor, OptionsT, Context[StatisticsT]], Tensor]
    statistics: FromTaskVectors[OptionsT, StatisticsT] | FromData[OptionsT, StatisticsT] | None = (
        None
    )
    elementwise: bool = False
    check: Callable[[OptionsT, Sequence[str]], list[str]] | None = None

    def __post_init__(self) -> None:
        if self.needs_data and not issubclass(self.options, DataOptions):
            # Without them no data would be loaded.
            raise TypeError(f"{self.options.__name__}: statistics from data need DataOptions")

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)

    @property
    def needs_data(self) -> bool:
        """Whether it runs models on calibration data."""
        return isinstance(self.statistics, FromData)

    @property
    def needs_heads(self) -> bool:
        """Whether it needs the tasks' heads."""
        return isinstance(self.statistics, FromData) and self.statistics.needs_heads

    def problems(self, options: OptionsT, tasks: Sequence[str]) -> list[str]:
        """Return one sentence for each problem of the options with these tasks."""
        check = self.check
        if check is None:
            return []
        problems = [text for variant in options.variants() for text in check(variant, tasks)]
        return list(dict.fromkeys(problems))


@dataclass(frozen=True)
class Merger(Generic[OptionsT, StatisticsT]):
    """A method with all it needs to merge the tensors of a model.

    Attributes:
        method: the method.
        options: of the whole model.
        tasks: names of the experts.
        statistics: see ``Context``.
        factors: on the scaling, by tensor name, for ``ScaledOptions``; 1 where there is none.
    """

    method: MergeMethod[OptionsT, StatisticsT]
    options: OptionsT
    tasks: Sequence[str]
    statistics: StatisticsT
    factors: Mapping[str, float] = field(default_factory=dict)

    def merge(self, name: str, base: Tensor, task_vectors: Tensor) -> Tensor:
        """Merge one tensor.

        Args:
            name: of the tensor.
            base: ``[*]``, float32.
            task_vectors: ``[T, *]``, float32.
        """
        method, options = self.method, self.options.for_tensor(name)
        if name in self.factors and isinstance(options, ScaledOptions):
            options = options.at(options.scaling * self.factors[name])
        context = Context(name, self.tasks, self.statistics)
        if not method.elementwise:
            return method.merge(base, task_vectors, options, context)
        # Written in place: keeping results between temporaries fragments the heap.
        merged = base.new_empty(base.shape)
        parts = zip(pieces(base[None]), pieces(task_vectors), pieces(merged[None]), strict=True)
        for start, vectors, result in parts:
            result[0] = method.merge(start[0], vectors, options, context)
        return merged
