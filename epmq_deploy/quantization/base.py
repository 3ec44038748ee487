"""What a calibration target is: a choice of ``(W*, H)`` for the one solver.

Every method minimises ``tr((Q - W*) H (Q - W*)^T)`` over the grid. For the anchored problem

    min_Q  sum_t s_t || X_t Q^T - Y_t ||_F^2 / n_t  +  lambda || Q - A ||_F^2

completing the square gives ``H = sum_t s_t C_t + lambda I`` and
``W* = (sum_t s_t G_t + lambda A) H^-1`` with ``C_t = X_t^T X_t / n_t``,
``G_t = Y_t^T X_t / n_t`` (E-PMQ, arXiv 2605.16882).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from epmq_deploy.options.quantization import CalibratedOptions, QuantizeOptions
from epmq_deploy.quantization.arithmetic import Arithmetic

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
    from epmq_deploy.quantization.solver.hessian import GroupHessian, Hessian


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


class QuantizationMethod(ABC, Generic[O]):
    """One method.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: one line with the source.
        guide: whose weights and outputs it needs: the unquantized merged model's, the experts'.
        arithmetic: in which dtypes it computes unless the options say otherwise.
    """

    options: type[O]
    summary: ClassVar[str]
    guide: ClassVar[Guide] = Guide.NOTHING
    arithmetic: ClassVar[Arithmetic] = Arithmetic()

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)

    @property
    def uses_experts(self) -> bool:
        """Whether base and experts must be there."""
        return self.guide is Guide.EXPERTS

    def products_dtype(self, options: QuantizeOptions) -> torch.dtype:
        """In which dtype blocks are run and products of activations computed."""
        given = getattr(options, "products", None)
        return replace(self.arithmetic, products=given or self.arithmetic.products).products_dtype

    def solver_dtype(self, options: QuantizeOptions) -> torch.dtype:
        """In which dtype Hessians are factored and codes chosen."""
        given = getattr(options, "solver", None)
        return replace(self.arithmetic, solver=given or self.arithmetic.solver).solver_dtype

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
