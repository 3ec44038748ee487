"""Low-rank corrections of one linear layer, one for every task, stored in few bits.

A task's correction is ``D = A diag(s) B`` with 4-bit ``A [N, r]`` and ``B [r, K]``; each scale is
that of A's column times that of B's row. What it adds to the layer's bias has 8 bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Twice the rank at 4 bits is better than at 8: the rounding of a small correction is smaller still.
FACTOR_BITS, BIAS_BITS = 4, 8
# Of the largest value of a slice, the shares that are tried as the largest one stored.
_CLIPS = tuple(1 - 0.05 * step for step in range(11))


@dataclass(frozen=True)
class TaskCorrection:
    """One task's correction of one layer, with a bias that is not yet rounded.

    Attributes:
        left: ``A``, int8 ``[N, r]``, of `FACTOR_BITS`.
        right: ``B``, int8 ``[r, K]``, of `FACTOR_BITS`.
        scales: ``s``, float32 ``[r]``.
        bias: what is added to the layer's bias, float ``[N]``; None without a bias.
    """

    left: Tensor
    right: Tensor
    scales: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerResiduals:
    """Corrections of one layer for T tasks.

    Attributes:
        left: ``A``, int8 ``[T, N, r]``, of `FACTOR_BITS`.
        right: ``B``, int8 ``[T, r, K]``, of `FACTOR_BITS`.
        scales: ``s``, float32 ``[T, r]``.
        bias: what is added to the layer's bias, in steps, int8 ``[T, N]``; None without a bias.
        bias_scale: the step, float32 scalar; None without a bias.
    """

    left: Tensor
    right: Tensor
    scales: Tensor
    bias: Tensor | None = None
    bias_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """``r``."""
        return self.scales.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by field."""
        fields = {
            "left": self.left,
            "right": self.right,
            "scales": self.scales,
            "bias": self.bias,
            "bias_scale": self.bias_scale,
        }
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors, the factors packed to their bits."""
        factors = self.left.numel() + self.right.numel()
        others = sum(
            part.nbytes for name, part in self.tensors.items() if name not in ("left", "right")
        )
        return factors * FACTOR_BITS // 8 + others

    def weight(self, task: int) -> Tensor:
        """Return a task's ``D``, float32 ``[N, K]``."""
        right = self.right[task].to(torch.float32) * self.scales[task][:, None]
        return self.left[task].to(torch.float32) @ right

    def bias_change(self, task: int) -> Tensor | None:
        """Return what a task adds to the layer's bias, float32 ``[N]``; None without a bias."""
        if self.bias is None or self.bias_scale is None:
            return None
        return self.bias[task].to(torch.float32) * self.bias_scale


@dataclass(frozen=True)
class ModelResiduals:
    """Corrections of a model's layers.

    Attributes:
        tasks: names, in the order of the corrections.
        layers: by dotted name; all of the same tasks.
    """

    tasks: tuple[str, ...] = ()
    layers: Mapping[str, LayerResiduals] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all layers' corrections."""
        return sum(layer.packed_bytes for layer in self.layers.values())

    def joined(self, other: "ModelResiduals") -> "ModelResiduals":
        """Return these and those of further layers, of the same tasks."""
        return ModelResiduals(self.tasks or other.tasks, {**self.layers, **other.layers})


def stacked(corrections: Sequence[TaskCorrection]) -> LayerResiduals:
    """Return one layer's corrections for several tasks, on the CPU; their biases share a scale."""
    left, right, scales = (
        torch.stack([getattr(each, name) for each in corrections]).cpu()
        for name in ("left", "right", "scales")
    )
    biases = [each.bias for each in corrections if each.bias is not None]
    if not biases:
        return LayerResiduals(left, right, scales)
    together = torch.stack(biases).cpu()
    steps, scale = rounded(together.flatten(), 0, BIAS_BITS)
    return LayerResiduals(left, right, scales, steps.reshape(together.shape), scale)


def rounded(values: Tensor, dim: int, bits: int = FACTOR_BITS) -> tuple[Tensor, Tensor]:
    """Round to signed integers with one scale for each slice along ``dim``.

    Of scales that clip up to half of the largest value, each is the one with the least squared
    error.

    Args:
        values: float.
        dim: whose entries share a scale.
        bits: at most 8; the lowest code is left out, so that codes are symmetric.

    Returns:
        Codes, int8, and float32 scales without ``dim``; slices that are all 0 have scale 0.
    """
    largest = 2 ** (bits - 1) - 1
    full = (values.abs().amax(dim, keepdim=True) / largest).to(torch.float32)
    best = torch.full_like(full, math.inf, dtype=values.dtype)
    scales = full
    for share in _CLIPS:
        steps = share * full
        codes = _codes(values, steps, largest)
        error = (codes * steps.to(values.dtype) - values).square().sum(dim, keepdim=True)
        scales = torch.where(error < best, steps, scales)
        best = torch.minimum(best, error)
    return _codes(values, scales, largest).to(torch.int8), scales.squeeze(dim)


def _codes(values: Tensor, scales: Tensor, largest: int) -> Tensor:
    """Return values in steps of their scales, in their dtype; 0 where the scale is 0."""
    steps = torch.where(scales > 0, scales, torch.ones_like(scales)).to(values.dtype)
    return (values / steps).round().clamp(-largest, largest)
