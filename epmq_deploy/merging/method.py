"""What a merge method is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from epmq_deploy.merging.calibrated import Calibrated, CalibrationData
from epmq_deploy.options import Options, given_for, layers_from_text, texts_read_by

# Parameters that elementwise methods take at a time: temporaries of 20 tasks stay in the cache.
CHUNK = 2**15


def pieces(values: Tensor) -> Iterator[Tensor]:
    """``values [T, *]`` cut into ``[T, n]`` with ``n`` at most ``CHUNK``, in order."""
    flat = values.reshape(len(values), -1)
    for first in range(0, flat.shape[1], CHUNK):
        yield flat[:, first : first + CHUNK]


class MergeOptions(Options):
    """Options every merge method has."""

    method: str = Field(description="merge method")
    dtype: Literal["base", "float32", "float16", "bfloat16"] = Field(
        "base", description="dtype of the merged checkpoint; arithmetic is always float32"
    )
    mixed_dtypes: bool = Field(
        False, description="accept experts stored in another float dtype than the base"
    )
    layers: Annotated[dict[str, dict[str, Any]], texts_read_by(layers_from_text)] = Field(
        {},
        description="other options of the method for tensors by name pattern "
        "(*.mlp.*:scaling=0.2); of two patterns the later one counts",
    )

    whole_model: ClassVar[frozenset[str]] = frozenset()
    """Own options of the method that cannot differ between tensors."""

    @model_validator(mode="after")
    def _layers_hold_options(self) -> Self:
        for pattern, given in self.layers.items():
            unknown = given.keys() - self.by_layer()
            if unknown:
                raise ValueError(
                    f"layers.{pattern}: {', '.join(sorted(unknown))} cannot be set by layer; "
                    f"{self.method} allows {', '.join(self.by_layer()) or 'nothing'} there"
                )
            try:
                self._with(given)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in (pattern, *first["loc"]))
                text = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"layers.{where}: {text}") from error
        return self

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the merged weights, as plain data."""
        return self.model_dump(mode="json")

    @classmethod
    def by_layer(cls) -> tuple[str, ...]:
        """The options that ``layers`` may hold: the method's own, less ``whole_model``."""
        shared = MergeOptions.model_fields.keys() | cls.whole_model
        return tuple(name for name in cls.model_fields if name not in shared)

    def for_tensor(self, name: str) -> Self:
        """These options as they hold for one tensor."""
        own = given_for(self.layers, name)
        return self._with(own) if own else self

    def idle(self) -> dict[str, str]:
        """Options that were given but have no effect beside the others, and why not."""
        return {}

    def variants(self) -> tuple[Self, ...]:
        """These options and those of every pattern in ``layers``."""
        return (self, *(self._with(given) for given in self.layers.values()))

    def _with(self, own: dict[str, Any]) -> Self:
        return type(self).model_validate(self.model_dump() | own | {"layers": {}})


SearchObjective = Literal["experts", "labels", "entropy"]


class ScaledOptions(MergeOptions):
    """Options of methods whose result is linear in their ``scaling``."""

    search: bool = Field(
        False,
        description="tune scaling on calibration samples, by search_objective",
    )
    search_objective: SearchObjective = Field(
        "experts",
        description="what the merged model is to predict closely: what the experts predict, the "
        "data's labels (cross-entropy), or anything at all (least entropy); only labels need any",
    )
    search_samples: int = Field(64, ge=2, description="samples per task that scaling is tuned on")

    whole_model: ClassVar[frozenset[str]] = frozenset(
        {"search", "search_objective", "search_samples"}
    )

    @model_validator(mode="after")
    def _search_starts_above_zero(self) -> Self:
        if self.search and self.scaling_value() <= 0:
            raise ValueError("scaling must be positive to be searched from")
        return self

    def idle(self) -> dict[str, str]:
        """What says how to search, where nothing is searched."""
        given = {"search_objective", "search_samples"} & self.model_fields_set
        reason = "without merge.search (--search)"
        return {} if self.search else dict.fromkeys(sorted(given), reason)

    def _with(self, own: dict[str, Any]) -> Self:
        # Searching is for the whole model; a tensor's own scaling stays as it is.
        return super()._with({**own, "search": False})

    def scaling_value(self) -> float:
        """The method's ``scaling``; each has a default of its own."""
        value: float = getattr(self, "scaling")  # noqa: B009 - declared by the methods
        return value

    def at(self, scaling: float) -> Self:
        """These options with another scaling."""
        return self.model_copy(update={"scaling": scaling})


class DataOptions(MergeOptions):
    """Options of methods that need calibration data."""

    samples: int = Field(256, ge=1, description="calibration samples per task")
    seed: int = Field(0, description="seed of the choice of samples, and of other random draws")

    whole_model: ClassVar[frozenset[str]] = frozenset({"samples", "seed"})


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
