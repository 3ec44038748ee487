"""Round to nearest: the merged weights, every column on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from epmq_deploy.lazy import torch
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization import solver
from epmq_deploy.quantization.base import LayerProblem, LayerWeights, QuantizationMethod

if TYPE_CHECKING:
    from epmq_deploy.calibration.statistics import GroupSums
    from epmq_deploy.quantization.solver.hessian import GroupHessian


class RtnOptions(QuantizeOptions):
    """Round to nearest."""

    method: Literal["rtn"] = "rtn"


class Rtn(QuantizationMethod[RtnOptions]):
    """``W* = W_m``, ``H = I``; no calibration data."""

    options = RtnOptions
    summary = "round the merged weights to nearest; no calibration data"
    source = "uniform affine quantization as ONNX defines it"

    def hessian(self, sums: GroupSums, options: RtnOptions) -> GroupHessian:
        """Return the identity: every weight counts alike."""
        identity = solver.hessian.Identity(len(sums.mean), sums.mean.device)
        return solver.hessian.GroupHessian(identity, sums.mean, sums.weight)

    def problem(
        self, layer: LayerWeights, sums: GroupSums, hessian: GroupHessian, options: RtnOptions
    ) -> LayerProblem:
        """Return the merged weights, to be reproduced as they are."""
        weight = layer.merged.to(torch.float64)
        return LayerProblem(weight, hessian.plain, hessian.plain.quadratic(weight))


METHOD = Rtn()
