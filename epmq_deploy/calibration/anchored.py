"""The anchored least-squares problem that guided targets share."""

import torch
from torch import Tensor

from epmq_deploy.calibration.hessian import GroupHessian
from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.calibration.target import LayerProblem, LayerWeights


def anchored_problem(
    layer: LayerWeights,
    sums: GroupSums,
    hessian: GroupHessian,
    anchor: Tensor,
    bias_anchor: Tensor | None,
    *,
    strength: float,
    bias_strength: float,
    joint: bool,
) -> LayerProblem:
    """``W* = (sum s_t G_t + strength A) H^-1``, with a free bias eliminated where asked.

    Args:
        layer: the layer.
        sums: over all tasks, with what guides want of the layer.
        hessian: ``sum s_t C_t + strength I``.
        anchor: ``A``, float ``[N, K]``.
        bias_anchor: ``[N]``, where the layer has a bias.
        strength: lambda.
        bias_strength: pull of re-fitted biases to ``bias_anchor``.
        joint: solve for weights and bias together.
    """
    right = sums.cross[layer.name] + strength * anchor.to(torch.float64)
    chosen = hessian.plain
    if joint and bias_anchor is not None and sums.tokens:
        chosen = hessian.centred
        # With b at its best for every Q, b = (total - Q mean) / weight.
        total = sums.output_mean[layer.name] + bias_strength * bias_anchor.to(torch.float64)
        right = right + sums.bias_cross(layer.name)
        right.addr_(total, sums.mean, alpha=-1 / (sums.weight + bias_strength))
    target = chosen.solve(right, anchor)
    # W* H is the right-hand side.
    size = float((target.to(torch.float64) * right).sum())
    return LayerProblem(target, chosen, size, bias_anchor, bias_strength)
