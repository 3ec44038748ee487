"""Calibrating gains and biases of norms: a ridge fit per channel (FeatCal, arXiv 2605.13030)."""

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

    def add(self, activations: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            activations: ``n``, ``[tokens, K]``.
            wanted: ``y``, likewise.
            weights: of each token, ``[tokens]``.
        """
        w, n, y = weights.to(activations.dtype), activations, wanted
        self.weight += float(w.sum())
        self.n += w @ n
        self.y += w @ y
        self.nn += w @ (n * n)
        self.ny += w @ (n * y)
        self.yy += w @ (y * y)

    def add_mean(self, task: "NormSums") -> None:
        """Add a task's sums, scaled to a weight of 1: tasks count alike, whatever their size."""
        for mine, theirs in zip(self._parts(), task._parts(), strict=True):
            mine.add_(theirs, alpha=1 / task.weight)
        self.weight += 1.0

    def _parts(self) -> tuple[Tensor, ...]:
        return self.n, self.y, self.nn, self.ny, self.yy

    def error(self, gain: Tensor, bias: Tensor | None) -> float:
        """``sum (gain n + bias - y)^2`` over channels, relative to ``sum y^2``."""
        g = gain.to(torch.float64)
        b = torch.zeros_like(g) if bias is None else bias.to(torch.float64)
        squares = g * g * self.nn + b * b * self.weight + self.yy
        crossed = g * b * self.n - g * self.ny - b * self.y
        return float((squares + 2 * crossed).sum() / self.yy.sum())


def fit_affine(
    sums: NormSums, gain: Tensor, bias: Tensor | None, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Gain and bias, float32 ``[K]``, that bring ``gain n + bias`` closest to ``y``.

    Minimises, per channel, ``mean (g n + b - y)^2 + damping ((g - gain)^2 + (b - bias)^2)``: a 2x2
    linear system, or one equation where the norm has no bias (RMSNorm).

    Args:
        sums: over calibration tokens.
        gain: anchor ``[K]``.
        bias: anchor ``[K]``; None for a norm without one.
        damping: pull towards the anchor, positive.
    """
    a = sums.nn / sums.weight + damping
    right_gain = sums.ny / sums.weight + damping * gain.to(torch.float64)
    if bias is None:
        return (right_gain / a).to(torch.float32), None
    b = sums.n / sums.weight
    d = 1.0 + damping
    right_bias = sums.y / sums.weight + damping * bias.to(torch.float64)
    determinant = a * d - b * b
    new_gain = (d * right_gain - b * right_bias) / determinant
    new_bias = (a * right_bias - b * right_gain) / determinant
    return new_gain.to(torch.float32), new_bias.to(torch.float32)


def pre_affine(norm: nn.Module, inputs: Tensor) -> Tensor:
    """What a LayerNorm or RMSNorm multiplies with its gain, ``[..., K]``."""
    plain = {name: torch.zeros_like(value) for name, value in norm.named_parameters()}
    plain["weight"] = torch.ones_like(plain["weight"])
    output: Tensor = torch.func.functional_call(norm, plain, (inputs,))
    return output
