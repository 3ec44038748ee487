"""GPTAQ (Li et al., arXiv 2504.02692): reproduce the outputs of the unquantized path.

GPTQ asks each layer to answer the quantized path's inputs as the merged layer would. The error of
earlier layers is in those inputs already, so here the layer is asked for what it would give on the
unquantized path: ``Y_t = Z_t W_m^T``. That problem is solved exactly, anchored at ``W_m``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.options.quantization import CalibratedOptions
from epmq_deploy.quantization.anchored import anchored_problem
from epmq_deploy.quantization.base import (
    CalibratedMethod,
    CalibrationSettings,
    LayerProblem,
    LayerWeights,
)

if TYPE_CHECKING:
    from torch import nn

    from epmq_deploy.calibration.statistics import GroupSums
    from epmq_deploy.quantization.expert_source import ExpertSource
    from epmq_deploy.quantization.solver.hessian import GroupHessian


class GptaqOptions(CalibratedOptions):
    """GPTAQ."""

    method: Literal["gptaq"] = "gptaq"
    damping: float = Field(
        0.01,
        gt=0,
        description="pull towards the merged weights, relative to the Hessian's mean diagonal",
    )


class Gptaq(CalibratedMethod[GptaqOptions]):
    """``Y_t = Z_t W_m^T``, ``A = W_m``; ``Z_t`` are the layer's inputs in the merged model."""

    options = GptaqOptions
    summary = "reproduce the unquantized merged model's outputs"
    source = "GPTAQ, arXiv 2504.02692"

    def expert_source(self, model: nn.Module, experts: ExpertSource | None) -> ExpertSource:
        """Return the merged model in the place of every expert."""
        from epmq_deploy.quantization.expert_source import MergedAsExpert

        return MergedAsExpert(copy.deepcopy(model))

    def calibration(self, options: GptaqOptions) -> CalibrationSettings:
        """Return settings that aim at the unquantized path's own outputs and nothing else."""
        return replace(super().calibration(options), mix=1.0)

    def damping(self, sums: GroupSums, options: GptaqOptions) -> float:
        """Return a share of the mean diagonal."""
        return options.damping * float(sums.gram.diagonal().mean())

    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: GptaqOptions
    ) -> LayerProblem:
        """Return the problem anchored at the merged weights."""
        return anchored_problem(
            layer,
            sums,
            hessian,
            layer.merged,
            layer.bias,
            strength=self.damping(sums, options),
            bias_strength=self.bias_damping(options),
            joint=self.fits_jointly(layer, options),
        )


METHOD = Gptaq()
