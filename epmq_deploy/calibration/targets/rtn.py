"""Round to nearest: the merged weights, every column on its own."""

from typing import Literal

import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.calibration.target import CalibrationTarget, LayerProblem, QuantizeOptions


class RtnOptions(QuantizeOptions):
    """Round to nearest."""

    method: Literal["rtn"] = "rtn"


class Rtn(CalibrationTarget[RtnOptions]):
    """``W* = W_m``, ``H = I``; no calibration data."""

    options = RtnOptions
    summary = "round the merged weights to nearest; no calibration data"
    uses_data = False

    def problem(
        self, merged: Tensor, sums: GroupSums, cross: Tensor | None, options: RtnOptions
    ) -> LayerProblem:
        """See base."""
        identity = torch.eye(merged.shape[1], dtype=torch.float64, device=merged.device)
        return LayerProblem(merged.to(torch.float64), identity, bias_damping=0.0)


TARGET = Rtn()
