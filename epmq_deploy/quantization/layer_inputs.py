"""What calibration saw of a layer's inputs, for runtimes that compute with integers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.quantization.solver.hessian import Hessian


@dataclass(frozen=True)
class LayerInputs:
    """Inputs ``x`` of one quantized layer over all calibration tokens.

    Attributes:
        low: smallest, float32 ``[K]``.
        high: largest, float32 ``[K]``.
        square: mean of ``x^2``, float32 ``[K]``, tokens and tasks weighted as for the codes.
        output: mean of ``||Q x||^2`` with the layer's dequantized weight ``Q``, without bias,
            likewise.
    """

    low: Tensor
    high: Tensor
    square: Tensor
    output: float


def layer_inputs(sums: GroupSums, weight: Tensor) -> LayerInputs | None:
    """What is known of the inputs of a layer with weight ``[N, K]``; None without activations."""
    if sums.low is None or sums.high is None:
        return None
    # Codes are on the CPU, statistics where models run.
    energy = Hessian(sums.gram, dtype=weight.dtype).quadratic(weight.to(sums.gram.device))
    return LayerInputs(
        sums.low.cpu(),
        sums.high.cpu(),
        (sums.gram.diagonal() / sums.weight).to(torch.float32).cpu(),
        energy / sums.weight,
    )
