"""Round to nearest: the merged weights, every column on its own."""

from typing import Literal

import torch

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.calibration.target import (
    CalibrationTarget,
    LayerProblem,
    LayerWeights,
    QuantizeOptions,
)


class RtnOptions(QuantizeOptions):
    """Round to nearest."""

    method: Literal["rtn"] = "rtn"


class Rtn(CalibrationTarget[RtnOptions]):
    """``W* = W_m``, ``H = I``; no calibration data."""

    options = RtnOptions
    summary = "round the merged weights to nearest; no calibration data"

    def problem(self, layer: LayerWeights, sums: GroupSums, options: RtnOptions) -> LayerProblem:
        """See base."""
        identity = torch.eye(layer.merged.shape[1], dtype=torch.float64, device=layer.merged.device)
        return LayerProblem(layer.merged.to(torch.float64), identity)


TARGET = Rtn()
