"""E-PMQ: aim each layer at its experts' outputs, anchored.

Preset ``paper`` is arXiv 2605.16882; preset ``features`` takes its target from feature calibration
(FeatCal, arXiv 2605.13030).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from epmq_deploy.calibration.statistics import ExpertOutputs, GroupSums, TaskStatistics
from epmq_deploy.calibration.target import (
    CalibratedOptions,
    CalibrationTarget,
    LayerProblem,
    LayerWeights,
)


@dataclass(frozen=True)
class Preset:
    """Values an option takes when it is not given.

    Attributes:
        anchor: lambda.
        alpha: share of the experts' own features in the target.
        rho: anchor between base (0), merged (1) and beyond.
        norms: re-fit LayerNorms.
    """

    anchor: float
    alpha: float
    rho: float
    norms: bool


PRESETS = {
    "paper": Preset(anchor=0.05, alpha=0.0, rho=1.0, norms=False),
    "features": Preset(anchor=0.05, alpha=0.25, rho=2.2, norms=True),
}


class EpmqOptions(CalibratedOptions):
    """E-PMQ."""

    method: Literal["epmq"] = "epmq"
    preset: Literal["paper", "features"] = Field(
        "features",
        description="aim at the experts' weights on the student's inputs (paper) or mix in the "
        "experts' own features (features); sets anchor, alpha and rho unless given",
    )
    anchor: float | None = Field(
        None, gt=0, description="lambda, the pull towards the anchor weights; also the damping"
    )
    alpha: float | None = Field(
        None, ge=0, le=1, description="share of the experts' own features in the target"
    )
    rho: float | None = Field(
        None, description="anchor weights: rho * merged + (1 - rho) * base; 1 is the merged model"
    )
    norms: bool | None = Field(
        None, description="re-fit LayerNorm gains and biases towards the experts' outputs"
    )
    normalization: Literal["frobenius", "none"] = Field(
        "frobenius", description="weigh each task by 1 / ||C_t||_F, or all tasks alike"
    )

    @property
    def values(self) -> Preset:
        """Options as given, else the preset's."""
        preset = PRESETS[self.preset]
        return Preset(
            anchor=preset.anchor if self.anchor is None else self.anchor,
            alpha=preset.alpha if self.alpha is None else self.alpha,
            rho=preset.rho if self.rho is None else self.rho,
            norms=preset.norms if self.norms is None else self.norms,
        )


class Epmq(CalibrationTarget[EpmqOptions]):
    """``Y_t = ((1 - alpha) X_t + alpha Z_t) W_t^T``, anchor ``rho W_m + (1 - rho) W_b``.

    ``X_t`` are the student's inputs of the layer, ``Z_t`` the expert's own.
    """

    options = EpmqOptions
    summary = "aim at the experts' outputs, anchored at the merged weights (arXiv 2605.16882)"
    uses_experts = True

    def uses_features(self, options: EpmqOptions) -> bool:
        """Only a target without ``Z_t`` does without."""
        return options.values.alpha > 0

    def norm_mix(self, options: EpmqOptions) -> float | None:
        """Norms aim at the same mix as linear layers."""
        return options.values.alpha if options.values.norms else None

    def norm_damping(self, options: EpmqOptions) -> float:
        """The same anchor strength as for linear layers."""
        return options.values.anchor

    def task_weight(self, statistics: TaskStatistics, options: EpmqOptions) -> float:
        """``1 / ||C_t||_F``, so that no task drowns the others by the size of its activations."""
        if options.normalization == "none":
            return 1.0
        size = float(statistics.gram.norm())
        # A task whose inputs are all zero says nothing about the layer.
        return 1.0 / size if size > 0 else 0.0

    def expert_outputs(
        self, layer: str, expert: Tensor, statistics: TaskStatistics, options: EpmqOptions
    ) -> ExpertOutputs:
        """The expert's weight on a mix of the student's inputs and its own.

        ``Z_t W_t^T`` is the expert's own output, so no Gram matrix of ``Z_t`` is needed.
        """
        weight, alpha = expert.to(torch.float64), options.values.alpha
        cross, mean = weight @ statistics.gram, weight @ statistics.mean
        if alpha > 0:
            own = statistics.experts[layer]
            cross = (1 - alpha) * cross + alpha * own.cross
            mean = (1 - alpha) * mean + alpha * own.mean
        return ExpertOutputs(cross, mean)

    def problem(self, layer: LayerWeights, sums: GroupSums, options: EpmqOptions) -> LayerProblem:
        """See base."""
        strength, rho = options.values.anchor, options.values.rho
        anchor, bias = layer.merged.to(torch.float64), layer.bias
        if rho != 1:
            assert layer.base is not None, "guided targets are given the base's weights"
            anchor = rho * anchor + (1 - rho) * layer.base.to(torch.float64)
            if bias is not None and layer.base_bias is not None:
                bias = rho * bias + (1 - rho) * layer.base_bias
        hessian = sums.gram.clone()
        hessian.diagonal().add_(strength)
        right = sums.cross[layer.name] + strength * anchor
        # H is symmetric, so W* = right H^-1 is the transpose of solving H x = right^T.
        target = torch.linalg.solve(hessian, right.T).T
        return LayerProblem(target.contiguous(), hessian, bias, bias_damping=strength)


TARGET = Epmq()
