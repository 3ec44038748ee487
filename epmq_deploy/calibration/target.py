"""What a calibration target is: a choice of ``(W*, H)`` for the one solver.

Every method minimises ``tr((Q - W*) H (Q - W*)^T)`` over the grid. For the anchored problem

    min_Q  sum_t s_t || X_t Q^T - Y_t ||_F^2 / n_t  +  lambda || Q - A ||_F^2

completing the square gives ``H = sum_t s_t C_t + lambda I`` and
``W* = (sum_t s_t G_t + lambda A) H^-1`` with ``C_t = X_t^T X_t / n_t``,
``G_t = Y_t^T X_t / n_t`` (E-PMQ, arXiv 2605.16882).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator
from torch import Tensor

from epmq_deploy.calibration.hessian import GroupHessian, Hessian
from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
from epmq_deploy.options import Options


def _runs_somewhere(value: int) -> int:
    if value != -1 and (value < 16 or value % 16):
        raise ValueError("must be a multiple of 16 (what low-bit kernels run) or -1")
    return value


Bits = Literal[2, 3, 4, 8]
GroupSize = Annotated[int, AfterValidator(_runs_somewhere)]


class LayerOptions(Options):
    """Options that may differ between layers; what is not given is as for all layers."""

    bits: Bits | None = Field(None, description="bits per weight")
    group_size: GroupSize | None = Field(None, description="input columns that share a scale")
    symmetric: bool | None = Field(None, description="fix zero points at the middle code")

    @property
    def given(self) -> dict[str, Any]:
        """The options given."""
        return {name: value for name, value in self if value is not None}


def layers_from_text(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``PATTERN:option=value,...`` entries as a mapping.

    Raises:
        ValueError: an entry of another form.
    """
    found = {}
    for entry in entries:
        pattern, colon, assignments = str(entry).rpartition(":")
        pairs = [item.partition("=") for item in assignments.split(",")]
        if not colon or not all(equals for _, equals, _ in pairs):
            raise ValueError(f"{entry!r} is not of the form PATTERN:option=value,...")
        found[pattern] = {
            key.strip().replace("-", "_"): yaml.safe_load(text) for key, _, text in pairs
        }
    return found


class QuantizeOptions(Options):
    """Options every quantization method has."""

    method: str = Field(description="quantization method")
    bits: Bits = Field(4, description="bits per weight")
    group_size: GroupSize = Field(
        128, description="input columns that share a scale: a multiple of 16, or -1 per channel"
    )
    symmetric: bool = Field(
        False, description="fix zero points at the middle code instead of fitting them"
    )
    clip_search: bool = Field(
        True, description="shrink each group's range as long as its weighted error falls"
    )
    outer: bool = Field(
        True,
        description="quantize embeddings and projections outside the blocks too, to 8 bits",
    )
    skip: tuple[str, ...] = Field(
        (), description="layers to leave unquantized, as name patterns (*.mlp.fc2)"
    )
    layers: dict[str, LayerOptions] = Field(
        {},
        description="other options for layers by name pattern (*.mlp.fc2:bits=8,group_size=64)",
    )
    target_bits: float | None = Field(
        None,
        gt=0,
        le=8,
        description="choose bits per layer so that the blocks' weights have this many on average",
    )
    target_size: float | None = Field(
        None, gt=0, description="choose bits per layer so that quantized layers take this many MB"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_from_text(cls, value: Any) -> Any:
        """Command lines give ``PATTERN:option=value,...``."""
        return layers_from_text(value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("give target_bits or target_size, not both")
        return self

    def for_layer(self, name: str) -> Self:
        """These options as they hold for one layer; of two patterns the later one counts."""
        own: dict[str, Any] = {}
        for pattern, options in self.layers.items():
            if fnmatchcase(name, pattern):
                own |= options.given
        return self.model_copy(update=own) if own else self

    def skips(self, name: str) -> bool:
        """Whether a layer is left unquantized."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)


class CalibratedOptions(QuantizeOptions):
    """Options of every method that uses calibration data."""

    samples: int = Field(256, ge=1, description="calibration samples per task")
    seed: int = Field(0, description="seed of the choice of calibration samples")
    batch_size: int = Field(64, ge=1, description="samples per forward pass; no effect on accuracy")
    act_order: bool = Field(
        True, description="quantize columns by decreasing Hessian diagonal (static groups)"
    )
    refine: int = Field(
        3,
        ge=0,
        description="most sweeps of coordinate descent over codes and scales after the solver",
    )
    bias: Literal["joint", "after", "keep"] = Field(
        "after",
        description="fit biases together with the weights, after them (undoing the mean shift "
        "that quantization causes), or leave them",
    )
    unpooled_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight, in the last block, of tokens that no head reads; 1 unless the method "
        "says otherwise",
    )
    products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype in which products of activations are computed (sums stay float32); "
        "bfloat16 is faster where the processor has matrix units for it",
    )
    cache_limit: float | None = Field(
        4.0, ge=0, description="GiB of activations held in memory; the rest goes to disk"
    )
    cache_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of activations kept between blocks; 16 bits halve the cache"
    )
    allow_fallback: bool = Field(
        False, description="round layers whose Hessian cannot be factored instead of failing"
    )

    @property
    def cache_bytes(self) -> int | None:
        """``cache_limit`` in bytes."""
        return None if self.cache_limit is None else int(self.cache_limit * 2**30)


class Guide(Enum):
    """Whose outputs a target aims at."""

    NOTHING = "nothing"
    MERGED = "merged"
    EXPERTS = "experts"


O = TypeVar("O", bound=QuantizeOptions)  # noqa: E741


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights before quantization.

    Attributes:
        name: dotted name.
        merged: ``W_m``, float ``[N, K]``.
        bias: merged bias ``[N]``, where there is one.
        base: ``W_b``, float ``[N, K]``, for targets that use experts.
        base_bias: the base's bias, likewise.
    """

    name: str
    merged: Tensor
    bias: Tensor | None = None
    base: Tensor | None = None
    base_bias: Tensor | None = None


def fits_jointly(layer: LayerWeights, options: QuantizeOptions) -> bool:
    """Whether the layer's bias is solved for together with its weights."""
    joint = isinstance(options, CalibratedOptions) and options.bias == "joint"
    return joint and layer.bias is not None


@dataclass(frozen=True)
class LayerProblem:
    """What the solver is asked for.

    Attributes:
        weight: ``W*``, float64 ``[N, K]``.
        hessian: ``H``, with a free bias eliminated where biases are fitted jointly.
        size: ``tr(W* H W*^T)``, what errors are relative to.
        bias_anchor: bias that re-fitted biases are pulled to, ``[N]``; the merged one when absent.
        bias_damping: strength of that pull.
    """

    weight: Tensor
    hessian: Hessian
    size: float
    bias_anchor: Tensor | None = None
    bias_damping: float = 0.0


class CalibrationTarget(ABC, Generic[O]):
    """One method.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: one line with the source.
        guide: whose weights and outputs it needs: the unquantized merged model's, the experts'.
    """

    options: type[O]
    summary: ClassVar[str]
    guide: ClassVar[Guide] = Guide.NOTHING

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)

    @property
    def uses_experts(self) -> bool:
        """Whether base and experts must be there."""
        return self.guide is Guide.EXPERTS

    def is_data_free(self, options: O) -> bool:
        """Whether statistics come from weights alone."""
        return False

    def task_weight(self, statistics: TaskStatistics, options: O) -> float:
        """``s_t``, the weight of a task."""
        return 1.0

    def unpooled_weight(self, options: O) -> float:
        """Weight, in the last block, of tokens that no head reads."""
        given = getattr(options, "unpooled_weight", None)
        return 1.0 if given is None else float(given)

    def mix(self, options: O) -> float:
        """Share of the experts' own outputs in what guided layers aim at; 0 needs none."""
        return 0.0

    def norm_mix(self, options: O) -> float | None:
        """Share of the experts' own features when norms are re-fitted; None to leave them."""
        return None

    def norm_damping(self, options: O) -> float:
        """Pull of re-fitted norms towards the merged ones, per token."""
        return 0.0

    @abstractmethod
    def hessian(self, sums: GroupSums, options: O) -> GroupHessian:
        """``H`` of a group of layers that share their input.

        Args:
            sums: over all tasks; empty without calibration data.
            options: the method's options.
        """

    @abstractmethod
    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: O
    ) -> LayerProblem:
        """The problem of one layer.

        Args:
            layer: name, merged weight and, when ``uses_experts``, the base's.
            sums: over all tasks, for the layer's inputs; empty without calibration data.
            hessian: of the layer's group, from the same sums.
            options: the method's options.
        """
