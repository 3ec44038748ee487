"""Options of merging: of every method, of scaled ones, and of those that need data."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from epmq_deploy.options import Options, given_for, in_bytes, layers_from_text, texts_read_by


@dataclass(frozen=True)
class SampleNeed:
    """What options ask of calibration data.

    Attributes:
        limit: at most so many samples per task.
        option: the option that sets the limit, for messages.
        seed: of the choice of samples.
        purpose: what needs the samples, for messages.
    """

    limit: int
    option: str
    seed: int
    purpose: str


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
        description="options that differ for some tensors, by name pattern "
        "(*.mlp.*:scaling=0.2); if several patterns match, the last one counts",
    )

    whole_model: ClassVar[frozenset[str]] = frozenset()
    """Options of the method that cannot differ between tensors."""

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

    @property
    def sample_need(self) -> SampleNeed | None:
        """The calibration samples that merging needs; None where it needs none."""
        return None

    @property
    def to_search(self) -> "ScaledOptions | None":
        """These options, where their scaling is to be searched."""
        return None

    @classmethod
    def by_layer(cls) -> tuple[str, ...]:
        """Return the options that ``layers`` may hold: the method's, without ``whole_model``."""
        shared = MergeOptions.model_fields.keys() | cls.whole_model
        return tuple(name for name in cls.model_fields if name not in shared)

    def for_tensor(self, name: str) -> Self:
        """Return these options as they apply to one tensor."""
        changes = given_for(self.layers, name)
        return self._with(changes) if changes else self

    def idle(self) -> dict[str, str]:
        """Return options that were given but have no effect next to the others, with the reason."""
        return {}

    def variants(self) -> tuple[Self, ...]:
        """Return these options and those of every pattern in ``layers``."""
        return (self, *(self._with(given) for given in self.layers.values()))

    def _with(self, changes: dict[str, Any]) -> Self:
        return type(self).model_validate(self.model_dump() | changes | {"layers": {}})


SearchObjective = Literal["experts", "labels", "entropy"]


class ScaledOptions(MergeOptions):
    """Options of methods whose result is linear in their ``scaling``; each sets its default."""

    scaling: float = Field(description="factor on the merged task vector")
    first_block: float = Field(
        1.0,
        ge=0,
        description="factor on scaling in the first block and outside of blocks, rising linearly "
        "to 1 in the last block (LiNeS, arXiv 2410.17146); 1 scales all blocks alike",
    )
    search: bool = Field(
        False,
        description="tune scaling on calibration samples, by search_objective",
    )
    search_objective: SearchObjective = Field(
        "experts",
        description="what the search optimizes on calibration samples: agreement with the "
        "experts' predictions (experts), cross-entropy with the data's labels (labels; needs "
        "labelled data), or low entropy of the predictions (entropy)",
    )
    search_samples: int = Field(64, ge=2, description="samples per task that scaling is tuned on")

    whole_model: ClassVar[frozenset[str]] = frozenset(
        {"first_block", "search", "search_objective", "search_samples"}
    )

    @model_validator(mode="after")
    def _search_starts_above_zero(self) -> Self:
        if self.search and self.scaling <= 0:
            raise ValueError("scaling must be positive with search, which starts from it")
        return self

    @property
    def sample_need(self) -> SampleNeed | None:
        """The samples that scaling is searched on; None without search."""
        if not self.search:
            return None
        return SampleNeed(self.search_samples, "merge.search_samples", 0, "merge.search")

    @property
    def to_search(self) -> "ScaledOptions | None":
        """These options, with ``search``."""
        return self if self.search else None

    def idle(self) -> dict[str, str]:
        """Return the options of the search if there is none."""
        given = {"search_objective", "search_samples"} & self.model_fields_set
        reason = "without merge.search"
        return {} if self.search else dict.fromkeys(sorted(given), reason)

    def _with(self, changes: dict[str, Any]) -> Self:
        # The scaling of the whole model is searched; one set for a tensor by name stays.
        return super()._with({**changes, "search": False})

    def at(self, scaling: float) -> Self:
        """Return these options with another scaling."""
        return self.model_copy(update={"scaling": scaling})


class DataOptions(MergeOptions):
    """Options of methods that need calibration data."""

    samples: int = Field(256, ge=1, description="calibration samples per task")
    seed: int = Field(0, description="seed of the choice of samples, and of other random draws")

    whole_model: ClassVar[frozenset[str]] = frozenset({"samples", "seed"})

    @property
    def sample_need(self) -> SampleNeed:
        """The samples that experts run on."""
        purpose = f"merge.method {self.method}"
        return SampleNeed(self.samples, "merge.samples", self.seed, purpose)


class RandomDropOptions(ScaledOptions):
    """Options of methods that drop entries at random."""

    density: float = Field(
        0.5, gt=0, le=1, description="share of each task vector that is kept, chosen at random"
    )
    seed: int = Field(0, description="seed of that random choice")

    whole_model: ClassVar[frozenset[str]] = ScaledOptions.whole_model | {"seed"}


class ExtremesOptions(ScaledOptions):
    """Options of methods that drop the smallest and the largest entries."""

    beta: float = Field(
        0.85,
        ge=0,
        lt=1,
        description="share of each tensor's entries that are dropped as the smallest",
    )
    gamma: float = Field(
        0.993,
        gt=0,
        le=1,
        description="share of each tensor's entries that are not dropped as the largest",
    )

    @model_validator(mode="after")
    def _leave_some_between(self) -> Self:
        if self.gamma <= self.beta:
            raise ValueError(
                f"gamma {self.gamma:g} must be above beta {self.beta:g}: only the entries between "
                "these two shares are merged"
            )
        return self


Combine = Literal["sum", "mean"]


class CombineOptions(MergeOptions):
    """Options of methods that elect signs."""

    combine: Combine = Field(
        "sum", description="sum of the values that agree in sign, or their mean"
    )


class ActivationOptions(DataOptions):
    """Options of methods that look at what linear layers receive, block by block."""

    batch_size: int = Field(64, ge=1, description="samples per forward pass; no effect on accuracy")
    cache_limit: float | None = Field(
        4.0, ge=0, description="GiB of activations held in memory; the rest goes to disk"
    )

    whole_model: ClassVar[frozenset[str]] = DataOptions.whole_model | {"batch_size", "cache_limit"}

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the merged weights; where activations are kept does not."""
        return self.model_dump(mode="json", exclude={"cache_limit"})

    @property
    def cache_bytes(self) -> int | None:
        """``cache_limit`` in bytes, None for no limit."""
        return in_bytes(self.cache_limit)


class RegressionOptions(ActivationOptions):
    """Options of methods that merge linear layers by least squares; the rest is averaged."""

    off_diagonal: float = Field(
        1.0, ge=0, le=1, description="factor on the off-diagonal elements of the Gram matrices"
    )


class PolarizedOptions(ActivationOptions, ScaledOptions):
    """Options of methods that enlarge what is large and reduce what is small."""

    polarization: float = Field(
        2.0,
        ge=0,
        description="power of the relative norms by which tasks, input columns and layers of one "
        "kind are enlarged or reduced; 0 for none",
    )

    whole_model: ClassVar[frozenset[str]] = (
        ActivationOptions.whole_model | ScaledOptions.whole_model
    )

    def idle(self) -> dict[str, str]:
        """Return ``search_samples``, next to ``samples``."""
        idle = super().idle()
        if "search_samples" in self.model_fields_set:
            idle["search_samples"] = f"with {self.method}, whose merge.samples are searched on"
        return idle
