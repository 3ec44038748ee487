"""What a calibration target is: a choice of ``(W*, H)`` for the one solver.

Every method minimises ``tr((Q - W*) H (Q - W*)^T)`` over the grid. For the anchored problem

    min_Q  sum_t s_t || X_t Q^T - Y_t ||_F^2 / n_t  +  lambda || Q - A ||_F^2

completing the square gives ``H = sum_t s_t C_t + lambda I`` and
``W* = (sum_t s_t G_t + lambda A) H^-1`` with ``C_t = X_t^T X_t / n_t``,
``G_t = Y_t^T X_t / n_t`` (E-PMQ, arXiv 2605.16882).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from pydantic import Field, field_validator
from torch import Tensor

from epmq_deploy.calibration.statistics import ExpertOutputs, GroupSums, TaskStatistics
from epmq_deploy.options import Options


class QuantizeOptions(Options):
    """Options every quantization method has."""

    method: str = Field(description="quantization method")
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per weight")
    group_size: int = Field(
        128, description="input columns that share a scale: a multiple of 16, or -1 per channel"
    )
    symmetric: bool = Field(
        False, description="fix zero points at the middle code instead of fitting them"
    )
    clip_search: bool = Field(
        True, description="shrink each group's range as long as its weighted error falls"
    )
    skip: tuple[str, ...] = Field(
        (), description="layers to leave unquantized, as name patterns (*.mlp.fc2)"
    )

    @field_validator("group_size")
    @classmethod
    def _group_size_runs_somewhere(cls, value: int) -> int:
        if value != -1 and (value < 16 or value % 16):
            raise ValueError("must be a multiple of 16 (what low-bit kernels run) or -1")
        return value


class CalibratedOptions(QuantizeOptions):
    """Options of every method that uses calibration data."""

    samples: int = Field(256, ge=1, description="calibration samples per task")
    seed: int = Field(0, description="seed of the choice of calibration samples")
    batch_size: int = Field(64, ge=1, description="samples per forward pass; no effect on accuracy")
    act_order: bool = Field(
        True, description="quantize columns by decreasing Hessian diagonal (static groups)"
    )
    refine: int = Field(
        10,
        ge=0,
        description="most sweeps of coordinate descent over codes and scales after the solver",
    )
    bias: bool = Field(
        True, description="re-fit biases to undo the mean shift that quantization causes"
    )
    allow_fallback: bool = Field(
        False, description="round layers whose Hessian cannot be factored instead of failing"
    )


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


@dataclass(frozen=True)
class LayerProblem:
    """What the solver is asked for.

    Attributes:
        weight: ``W*``, float64 ``[N, K]``.
        hessian: ``H``, float64 ``[K, K]``, symmetric positive definite.
        bias_anchor: bias that re-fitted biases are pulled to, ``[N]``; the merged one when absent.
        bias_damping: strength of that pull.
    """

    weight: Tensor
    hessian: Tensor
    bias_anchor: Tensor | None = None
    bias_damping: float = 0.0


class CalibrationTarget(ABC, Generic[O]):
    """One method.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: one line with the source.
        uses_experts: needs the experts' weights, layer by layer.
    """

    options: type[O]
    summary: ClassVar[str]
    uses_experts: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)

    def task_weight(self, statistics: TaskStatistics, options: O) -> float:
        """``s_t``, the weight of a task."""
        return 1.0

    def uses_features(self, options: O) -> bool:
        """Whether the experts' own features are needed, not only their weights."""
        return False

    def norm_mix(self, options: O) -> float | None:
        """Share of the experts' own features when norms are re-fitted; None to leave them."""
        return None

    def norm_damping(self, options: O) -> float:
        """Pull of re-fitted norms towards the merged ones, per token."""
        return 0.0

    def expert_outputs(
        self, layer: str, expert: Tensor, statistics: TaskStatistics, options: O
    ) -> ExpertOutputs:
        """``Y_t^T X_t / n_t`` and the mean of ``Y_t``, without bias.

        Args:
            layer: dotted name.
            expert: the expert's weight, float ``[N, K]``.
            statistics: of the layer's inputs on the expert's task.
            options: the method's options.
        """
        raise NotImplementedError(f"{self.name} is not guided by experts")

    @abstractmethod
    def problem(self, layer: LayerWeights, sums: GroupSums, options: O) -> LayerProblem:
        """The problem of one layer.

        Args:
            layer: name, merged weight and, when ``uses_experts``, the base's.
            sums: over all tasks, for the layer's inputs; empty without calibration data.
            options: the method's options.
        """
