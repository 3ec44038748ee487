"""GPTQ (Frantar et al., arXiv 2210.17323): reproduce the merged layer on its own inputs."""

from typing import Literal

from pydantic import Field

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.calibration.target import (
    CalibratedOptions,
    CalibrationTarget,
    LayerProblem,
    LayerWeights,
)


class GptqOptions(CalibratedOptions):
    """GPTQ."""

    method: Literal["gptq"] = "gptq"
    damping: float = Field(
        0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean"
    )


class Gptq(CalibrationTarget[GptqOptions]):
    """``W* = W_m``, ``H = sum_t C_t``, damped."""

    options = GptqOptions
    summary = "reproduce the merged layer's outputs (arXiv 2210.17323)"

    def problem(self, layer: LayerWeights, sums: GroupSums, options: GptqOptions) -> LayerProblem:
        """See base."""
        hessian = sums.gram.clone()
        hessian.diagonal().add_(options.damping * float(hessian.diagonal().mean()))
        return LayerProblem(layer.merged.to(hessian.dtype), hessian)


TARGET = Gptq()
