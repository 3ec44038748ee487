"""Quantization grids: scales and zero points per group of input columns.

Uniform affine quantization as ONNX ``DequantizeLinear`` defines it:
``weight = (code - zero_point) * scale`` with ``0 <= code < 2**bits``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.quantization.solver.rounding import ROUND

# Values searched at a time on a CPU: the most for which an elementwise operation starts no threads,
# which would cost more than the work.
_CHUNK = 2**15 - 1
_ROUND = ROUND[torch.float32]
# The search: shares of the range tried first, then halvings of their distance around the best.
_SHARES = 8
_LEAST_SHARE = 0.4
_HALVINGS = 3
# Weight of the fourth power of an error in steps. It hardly affects rounding errors (at most half a
# step) but does affect clipped weights, whose errors the solver can compensate less well.
_CLIP_PENALTY = 0.1


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one ``[N, K]`` weight.

    Attributes:
        scales: float32 ``[N, G]``, positive.
        zero_points: uint8 ``[N, G]``.
        bits: width of a code.
        group_size: columns per group; the last group may be shorter.
        symmetric: every zero point is ``2**(bits - 1)``.
    """

    scales: Tensor
    zero_points: Tensor
    bits: int
    group_size: int
    symmetric: bool


def expand_groups(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat ``[N, G]`` values to one per column: ``[N, columns]``."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def quantize_to_codes(values: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, elementwise (shapes broadcast), in the dtype of ``values``."""
    return torch.clamp(torch.round(values / scales) + zero_points, 0, 2**bits - 1)


def fit_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    importance: Tensor | None = None,
    clip_search: bool = True,
) -> Grid:
    """Fit scales and zero points to a weight, group by group.

    Starts from the range of each group and, with ``clip_search``, looks for the part of it with the
    least ``sum_k importance_k scale**2 (d_k**2 + 0.1 d_k**4)``, where ``d_k`` is the error of
    ``w_k`` in steps. Searching for a range is from the GPTQ reference implementation (Frantar et
    al., arXiv 2210.17323), with a power of 2.4 of the error; weighting by the Hessian's diagonal
    aims the search at the inputs that occur.

    Args:
        weight: float ``[N, K]``, finite; left unmodified.
        bits: width of a code.
        group_size: columns per group, ``1 <= group_size <= K``.
        symmetric: fix the zero point at ``2**(bits - 1)``.
        importance: non-negative float ``[K]``; default: uniform.
        clip_search: shrink ranges; otherwise each group's full range is used.

    Returns:
        The grid; scales are float32 values, so that codes computed here and weights
        dequantized anywhere else agree bit for bit.
    """
    rows, columns = weight.shape
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    mass = importance.to(torch.float32)
    # A much shorter inner dimension would cost more than starting threads.
    width = max(64, _CHUNK // group_size) if weight.device.type == "cpu" else rows
    scales = torch.empty(rows, -(-columns // group_size), device=weight.device)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    for group, start in enumerate(range(0, columns, group_size)):
        part = slice(start, min(start + group_size, columns))
        for first in range(0, rows, width):
            chunk = slice(first, first + width)
            # One row per column of the weight, so that values of one group lie side by side.
            values = weight[chunk, part].T.to(
                torch.float32, memory_format=torch.contiguous_format, copy=True
            )
            search = _RangeSearch(values, mass[part], bits, symmetric)
            if clip_search:
                search.run()
            scales[chunk, group], zeros[chunk, group] = search.affine()
    return Grid(scales, zeros, bits, group_size, symmetric)


class _RangeSearch:
    """The search for one group's range in many rows of a weight at once.

    Attributes:
        low_share: share kept of the range below zero, float32 ``[n]``.
        high_share: the same above zero.
    """

    def __init__(self, values: Tensor, mass: Tensor, bits: int, symmetric: bool) -> None:
        """Start from the full range of ``values``, float32 ``[group_size, n]``."""
        self._values, self._mass, self._symmetric = values, mass, symmetric
        self._most, self._middle = 2**bits - 1, 2 ** (bits - 1)
        self._low = values.amin(dim=0).clamp_(max=0.0)
        self._high = values.amax(dim=0).clamp_(min=0.0)
        if symmetric:
            self._high = torch.maximum(-self._low, self._high)
            self._low = -self._high
        self.low_share = torch.ones_like(self._low)
        self.high_share = torch.ones_like(self._low)

    def run(self) -> None:
        """Set the shares to the best of those tried."""
        self._steps, self._error = torch.empty_like(self._values), torch.empty_like(self._values)
        self._least = self._cost(*self._affine(self.low_share, self.high_share))
        distance = (1 - _LEAST_SHARE) / (_SHARES - 1)
        for index in range(1, _SHARES):
            share = torch.full_like(self._low, 1 - index * distance)
            self._attempt(share, share)
        for _ in range(_HALVINGS):
            distance /= 2
            low, high = self.low_share, self.high_share
            for change in (-distance, distance):
                if self._symmetric:
                    self._attempt(low + change, high + change)
                else:
                    self._attempt(low + change, high)
                    self._attempt(low, high + change)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, float32 ``[n]``, of the best range."""
        return self._affine(self.low_share, self.high_share)

    def _affine(self, low_share: Tensor, high_share: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point that cover part of the range; scale 1 for an empty range."""
        low, high = self._low * low_share, self._high * high_share
        scale = (high - low).div_(self._most)
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
        if self._symmetric:
            return scale, torch.full_like(scale, self._middle)
        return scale, (-low).div_(scale).round_().clamp_(0, self._most)

    def _attempt(self, low_share: Tensor, high_share: Tensor) -> None:
        """Take the shares where they cost less than the best so far."""
        cost = self._cost(*self._affine(low_share, high_share))
        better = cost < self._least
        self._least = torch.where(better, cost, self._least)
        self.low_share = torch.where(better, low_share, self.low_share)
        self.high_share = torch.where(better, high_share, self.high_share)

    def _cost(self, scale: Tensor, zero: Tensor) -> Tensor:
        steps = torch.mul(self._values, 1 / scale, out=self._steps)
        error = torch.add(steps, zero + _ROUND, out=self._error)
        error.clamp_(_ROUND, _ROUND + self._most).sub_(zero + _ROUND).sub_(steps).square_()
        penalised = torch.addcmul(error, error, error, value=_CLIP_PENALTY, out=steps)
        return (self._mass @ penalised) * scale.square()
