"""E-PMQ (arXiv 2605.16882): aim each layer at its experts' outputs, anchored at the merge."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
from epmq_deploy.calibration.target import CalibratedOptions, CalibrationTarget, LayerProblem


class EpmqOptions(CalibratedOptions):
    """E-PMQ."""

    method: Literal["epmq"] = "epmq"
    preset: Literal["paper"] = Field(
        "paper", description="what experts are asked for: their outputs on the student's inputs"
    )
    anchor: float = Field(
        0.05, gt=0, description="lambda, the pull towards the merged weights; also the damping"
    )
    normalization: Literal["frobenius", "none"] = Field(
        "frobenius", description="weigh each task by 1 / ||C_t||_F, or all tasks alike"
    )


class Epmq(CalibrationTarget[EpmqOptions]):
    """``Y_t = X_t W_t^T`` with anchor ``W_m``."""

    options = EpmqOptions
    summary = "aim at the experts' outputs, anchored at the merged weights (arXiv 2605.16882)"
    uses_experts = True

    def task_weight(self, statistics: TaskStatistics, options: EpmqOptions) -> float:
        """``1 / ||C_t||_F``, so that no task drowns the others by the size of its activations."""
        if options.normalization == "none":
            return 1.0
        return 1.0 / max(float(statistics.gram.norm()), torch.finfo(torch.float64).tiny)

    def cross(self, expert: Tensor, statistics: TaskStatistics, options: EpmqOptions) -> Tensor:
        """``W_t C_t``: the expert's weight on the student's inputs."""
        return expert.to(torch.float64) @ statistics.gram

    def problem(
        self, merged: Tensor, sums: GroupSums, cross: Tensor | None, options: EpmqOptions
    ) -> LayerProblem:
        """See base."""
        assert cross is not None, "guided targets are given cross terms"
        hessian = sums.gram.clone()
        hessian.diagonal().add_(options.anchor)
        right = cross + options.anchor * merged.to(torch.float64)
        # H is symmetric, so W* = right H^-1 is the transpose of solving H x = right^T.
        target = torch.linalg.solve(hessian, right.T).T
        return LayerProblem(target.contiguous(), hessian, bias_damping=options.anchor)


TARGET = Epmq()
