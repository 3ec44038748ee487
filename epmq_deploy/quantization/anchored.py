"""The anchored least-squares problem of methods that aim at given outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epmq_deploy.lazy import torch
from epmq_deploy.quantization.base import LayerProblem, LayerWeights

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_deploy.calibration.statistics import GroupSums
    from epmq_deploy.quantization.solver.hessian import GroupHessian


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
    """Return ``W* = (sum s_t G_t + strength A) H^-1``, with a free bias eliminated where asked.

    Args:
        layer: the layer.
        sums: over all tasks, with the outputs aimed at.
        hessian: ``sum s_t C_t + strength I``.
        anchor: ``A``, float ``[N, K]``.
        bias_anchor: ``[N]``, where the layer has a bias.
        strength: lambda.
        bias_strength: pull of re-fitted biases to ``bias_anchor``.
        joint: solve for weights and bias together.
    """
    layer_hessian = hessian.plain
    dtype = layer_hessian.matrix.dtype
    right = sums.cross[layer.name].to(dtype) + strength * anchor.to(dtype)
    if joint and bias_anchor is not None and sums.tokens:
        layer_hessian = hessian.centred
        # The best bias for every Q is b = (total - Q mean) / weight.
        total = sums.output_mean[layer.name] + bias_strength * bias_anchor.to(torch.float64)
        right = right + sums.bias_cross(layer.name).to(dtype)
        shift = torch.outer(total, sums.mean) / (sums.weight + bias_strength)
        right -= shift.to(dtype)
    target = layer_hessian.solve(right, anchor)
    # W* H is the right-hand side.
    size = float((target * right).sum(dtype=torch.float64))
    return LayerProblem(target, layer_hessian, size, bias_anchor, bias_strength)
