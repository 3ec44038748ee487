"""GPTQ (Frantar et al., arXiv 2210.17323): reproduce the merged layer on its own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.lazy import torch
from epmq_deploy.options.quantization import CalibratedOptions
from epmq_deploy.quantization.base import CalibratedMethod, LayerProblem, LayerWeights

if TYPE_CHECKING:
    from epmq_deploy.calibration.statistics import GroupSums
    from epmq_deploy.quantization.solver.hessian import GroupHessian


class GptqOptions(CalibratedOptions):
    """GPTQ."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(
        0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean"
    )


class Gptq(CalibratedMethod[GptqOptions]):
    """``W* = W_m``, ``H = sum_t C_t``, damped."""

    options = GptqOptions
    summary = "reproduce the merged layer's outputs"
    source = "GPTQ, arXiv 2210.17323"

    def damping(self, sums: GroupSums, options: GptqOptions) -> float:
        """Return a share of the mean diagonal."""
        return options.damping * float(sums.gram.diagonal().mean())

    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: GptqOptions
    ) -> LayerProblem:
        """Return the merged weights as the target, whether or not the bias is free."""
        layer_hessian = hessian.centred if self.fits_jointly(layer, options) else hessian.plain
        weight = layer.merged.to(torch.float64)
        return LayerProblem(weight, layer_hessian, layer_hessian.quadratic(weight))


METHOD = Gptq()
