"""Calibrating LayerNorm gains and biases: a ridge fit per channel (FeatCal, arXiv 2605.13030)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class NormSums:
    """Weighted sums over tokens and tasks, per channel, float64 ``[K]``.

    With pre-affine activations ``n`` of the student and wanted outputs ``y``:

    Attributes:
        weight: total weight.
        n: ``sum n``.
        y: ``sum y``.
        nn: ``sum n^2``.
        ny: ``sum n y``.
        yy: ``sum y^2``, for the error.
    """

    weight: float
    n: Tensor
    y: Tensor
    nn: Tensor
    ny: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, channels: int, device: torch.device) -> "NormSums":
        """Empty sums."""
        parts = (torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(5))
        return cls(0.0, *parts)

    def add(self, activations: Tensor, wanted: Tensor, weight: float) -> None:
        """Add tokens ``[..., K]``, each with ``weight``."""
        n = activations.reshape(-1, activations.shape[-1]).to(torch.float64)
        y = wanted.reshape(n.shape).to(torch.float64)
        self.weight += weight * n.shape[0]
        for total, term in (
            (self.n, n),
            (self.y, y),
            (self.nn, n * n),
            (self.ny, n * y),
            (self.yy, y * y),
        ):
            total += weight * term.sum(dim=0)

    def error(self, gain: Tensor, bias: Tensor) -> float:
        """``sum (gain n + bias - y)^2`` over channels, relative to ``sum y^2``."""
        g, b = gain.to(torch.float64), bias.to(torch.float64)
        squares = g * g * self.nn + b * b * self.weight + self.yy
        crossed = g * b * self.n - g * self.ny - b * self.y
        return float((squares + 2 * crossed).sum() / self.yy.sum())


def fit_affine(sums: NormSums, gain: Tensor, bias: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Gain and bias, float32 ``[K]``, that bring ``gain n + bias`` closest to ``y``.

    Minimises, per channel, ``mean (g n + b - y)^2 + damping ((g - gain)^2 + (b - bias)^2)``: a 2x2
    linear system.

    Args:
        sums: over calibration tokens.
        gain: anchor ``[K]``.
        bias: anchor ``[K]``.
        damping: pull towards the anchor, positive.
    """
    a = sums.nn / sums.weight + damping
    b = sums.n / sums.weight
    d = 1.0 + damping
    right_gain = sums.ny / sums.weight + damping * gain.to(torch.float64)
    right_bias = sums.y / sums.weight + damping * bias.to(torch.float64)
    determinant = a * d - b * b
    new_gain = (d * right_gain - b * right_bias) / determinant
    new_bias = (a * right_bias - b * right_gain) / determinant
    return new_gain.to(torch.float32), new_bias.to(torch.float32)


def pre_affine(norm: nn.LayerNorm, inputs: Tensor) -> Tensor:
    """What a LayerNorm multiplies with its gain, ``[..., K]``."""
    return nn.functional.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
