"""What a quantization method is: a choice of ``(W*, H)`` for the one solver.

Every method minimises ``tr((Q - W*) H (Q - W*)^T)`` over the grid. For the anchored problem

    min_Q  sum_t s_t || X_t Q^T - Y_t ||_F^2 / n_t  +  lambda || Q - A ||_F^2

completing the square gives ``H = sum_t s_t C_t + lambda I`` and
``W* = (sum_t s_t G_t + lambda A) H^-1`` with ``C_t = X_t^T X_t / n_t``,
``G_t = Y_t^T X_t / n_t`` (E-PMQ, arXiv 2605.16882).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from epmq_deploy.lazy import torch
from epmq_deploy.options.quantization import CalibratedOptions, QuantizeOptions
from epmq_deploy.quantization import solver
from epmq_deploy.quantization.arithmetic import Arithmetic, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
    from epmq_deploy.quantization.expert_source import ExpertSource
    from epmq_deploy.quantization.solver.hessian import GroupHessian, Hessian


OptionsT = TypeVar("OptionsT", bound=QuantizeOptions)
CalibratedT = TypeVar("CalibratedT", bound=CalibratedOptions)


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights before quantization.

    Attributes:
        name: dotted name.
        merged: ``W_m``, float ``[N, K]``.
        bias: merged bias ``[N]``, where there is one.
        base: ``W_b``, float ``[N, K]``, for methods that use experts.
        base_bias: the base's bias ``[N]``, for methods that use experts.
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
        hessian: ``H``, with a free bias eliminated where biases are fitted jointly.
        size: ``tr(W* H W*^T)``, what errors are relative to.
        bias_anchor: bias that re-fitted biases are pulled to, ``[N]``; default: the merged one.
        bias_damping: strength of that pull.
    """

    weight: Tensor
    hessian: Hessian
    size: float
    bias_anchor: Tensor | None = None
    bias_damping: float = 0.0


@dataclass(frozen=True)
class SampleChoice:
    """Which calibration samples a method uses.

    Attributes:
        limit: most samples per task.
        seed: of their choice.
    """

    limit: int
    seed: int


@dataclass(frozen=True)
class CalibrationSettings:
    """How samples run through the blocks, and what layers aim at.

    Attributes:
        products: dtype in which blocks are run and products of activations computed.
        cache_dtype: dtype of activations kept between blocks.
        cache_bytes: bytes of activations held in memory, the rest on disk; None for no limit.
        batch_size: samples per forward pass.
        unpooled: weight, in the last block, of tokens that no head reads.
        mix: share of the experts' own outputs in what layers aim at; experts run along only
            where it is positive.
        norm_mix: the same share when norms are re-fitted; None to leave norms as they are.
        norm_damping: pull of re-fitted norms towards the merged ones, per token.
        guidance: power of tokens' squared gradients in their weights; 0 for none.
    """

    products: torch.dtype
    cache_dtype: torch.dtype
    cache_bytes: int | None = None
    batch_size: int = 1
    unpooled: float = 1.0
    mix: float = 0.0
    norm_mix: float | None = None
    norm_damping: float = 0.0
    guidance: float = 0.0


@dataclass(frozen=True)
class Candidate(Generic[OptionsT]):
    """One way to set a method's options.

    Attributes:
        settings: values of the options that differ between candidates, for reports.
        options: the method's options with these values.
        if_second_helps: try it only if the second candidate does better than the first (True), or
            only if it does not (False); None to try it in any case.
    """

    settings: Mapping[str, float | str]
    options: OptionsT
    if_second_helps: bool | None = None


@dataclass(frozen=True)
class AnchorSearch(Generic[OptionsT]):
    """A search for the strength of a method's anchor.

    Attributes:
        start: strength to begin with.
        options_with: the method's options with a given strength.
    """

    start: float
    options_with: Callable[[float], OptionsT]


class QuantizationMethod(ABC, Generic[OptionsT]):
    """One method: the problem it states, and what it needs for that.

    What the rest of the library has to know of a method's options it asks the method; only the
    method itself knows their type.

    Attributes:
        options: its option model, with a literal ``method`` field naming it.
        summary: what it does, in one line.
        source: where it is published.
        uses_experts: whether base and experts must be there.
        arithmetic: in which dtypes it computes unless the options say otherwise.
    """

    options: type[OptionsT]
    summary: ClassVar[str]
    source: ClassVar[str]
    uses_experts: ClassVar[bool] = False
    arithmetic: ClassVar[Arithmetic] = Arithmetic()

    @property
    def name(self) -> str:
        """The value of ``method`` that selects it."""
        return str(self.options.model_fields["method"].default)

    # What it needs.

    def samples(self, options: OptionsT) -> SampleChoice | None:
        """Return which calibration samples it uses; None where it uses none."""
        return None

    def is_data_free(self, options: OptionsT) -> bool:
        """Return whether statistics of layers' inputs come from task vectors instead of samples."""
        return False

    def needs_heads(self, options: OptionsT) -> list[str]:
        """Return the options given, as users write them, that need every task's head."""
        return []

    def expert_source(self, model: nn.Module, experts: ExpertSource | None) -> ExpertSource | None:
        """Return whose weights and outputs layers aim at; None where they aim at their own.

        Args:
            model: the merged model, unquantized; it may change afterwards.
            experts: base and experts where they are at hand.

        Raises:
            ValueError: the method needs experts and there are none.
        """
        if not self.uses_experts:
            return None
        if experts is None:
            raise ValueError(f"quantization method {self.name} needs base and experts")
        return experts

    # What may be tuned with it.

    def compares_predictions(self, options: OptionsT) -> bool:
        """Return whether heads are of use, though not needed: models are compared by them."""
        return bool(self.needs_heads(options))

    def candidates(self, options: OptionsT) -> tuple[Candidate[OptionsT], ...]:
        """Return options to choose among on held-back samples, the usual first; none to keep all.

        With them goes how strongly re-fitted heads are held.
        """
        return ()

    def may_refit_heads(self, options: OptionsT) -> bool:
        """Return whether heads may be re-fitted where that helps on held-back samples."""
        return False

    def head_pull(self, options: OptionsT) -> float | None:
        """Return the pull of re-fitted heads towards what they are; None to leave heads so."""
        return None

    def anchor_search(self, options: OptionsT) -> AnchorSearch[OptionsT] | None:
        """Return the search for the anchor's strength that the options ask for, if they do."""
        return None

    def weight_distillation_epochs(self, options: OptionsT) -> int:
        """Return for how many epochs weights are trained before they are quantized; 0 for none."""
        return 0

    def distillation_epochs(self, options: OptionsT) -> int:
        """Return for how many epochs the quantized model is distilled; 0 for not at all."""
        return 0

    def residual_rank(self, options: OptionsT) -> int:
        """Return the rank of layers' corrections for every task; 0 for none."""
        return 0

    # How it computes.

    def products_dtype(self, options: OptionsT) -> torch.dtype:
        """Return in which dtype blocks are run and products of activations computed."""
        return self.arithmetic.products_dtype

    def calibration(self, options: OptionsT) -> CalibrationSettings:
        """Return how samples run through the blocks, and what layers aim at."""
        return CalibrationSettings(self.products_dtype(options), torch.float32)

    def task_weight(self, statistics: TaskStatistics, options: OptionsT) -> float:
        """Return ``s_t``, the weight of a task."""
        return 1.0

    @abstractmethod
    def hessian(self, sums: GroupSums, options: OptionsT) -> GroupHessian:
        """Return ``H`` of a group of layers that share their input.

        Args:
            sums: over all tasks; empty without calibration data.
            options: the method's options.
        """

    @abstractmethod
    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: OptionsT
    ) -> LayerProblem:
        """Return the problem of one layer.

        Args:
            layer: name, merged weight and, when ``uses_experts``, the base's.
            sums: over all tasks, for the layer's inputs; empty without calibration data.
            hessian: of the layer's group, from the same sums.
            options: the method's options.
        """


class CalibratedMethod(QuantizationMethod[CalibratedT]):
    """A method that takes statistics from calibration samples; ``H = sum_t s_t C_t``, damped."""

    def samples(self, options: CalibratedT) -> SampleChoice | None:
        """Return the choice that the options make."""
        return SampleChoice(options.samples, options.seed)

    def products_dtype(self, options: CalibratedT) -> torch.dtype:
        """Return the dtype given, else the method's own."""
        products = options.products or self.arithmetic.products
        return replace(self.arithmetic, products=products).products_dtype

    def solver_dtype(self, options: CalibratedT) -> torch.dtype:
        """Return in which dtype Hessians are factored and codes chosen."""
        dtype = options.solver or self.arithmetic.solver
        return replace(self.arithmetic, solver=dtype).solver_dtype

    def calibration(self, options: CalibratedT) -> CalibrationSettings:
        """Return what the options say, with nothing of the experts' own outputs."""
        return CalibrationSettings(
            products=self.products_dtype(options),
            cache_dtype=torch_dtype(options.cache_dtype),
            cache_bytes=options.cache_bytes,
            batch_size=options.batch_size,
            unpooled=1.0 if options.unpooled_weight is None else options.unpooled_weight,
        )

    @abstractmethod
    def damping(self, sums: GroupSums, options: CalibratedT) -> float:
        """Return what is added to the diagonal of ``sum_t s_t C_t``."""

    def bias_damping(self, options: CalibratedT) -> float:
        """Return the pull of re-fitted biases towards their anchor."""
        return 0.0

    def hessian(self, sums: GroupSums, options: CalibratedT) -> GroupHessian:
        """Return ``sum_t s_t C_t`` with ``damping`` on its diagonal."""
        matrix = sums.gram.clone()
        matrix.diagonal().add_(self.damping(sums, options))
        plain = solver.hessian.Hessian(
            matrix, act_order=options.act_order, dtype=self.solver_dtype(options)
        )
        weight = sums.weight + self.bias_damping(options)
        return solver.hessian.GroupHessian(plain, sums.mean, weight)

    def fits_jointly(self, layer: LayerWeights, options: CalibratedT) -> bool:
        """Return whether a layer's bias is solved for together with its weights."""
        return options.bias == "joint" and layer.bias is not None
