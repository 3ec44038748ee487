"""Quantization grids: scales and zero points per group of input columns.

Uniform affine quantization as ONNX ``DequantizeLinear`` defines it:
``weight = (code - zero_point) * scale`` with ``0 <= code < 2**bits``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Values of a weight whose range is searched at a time.
_CHUNK = 2**18


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
    """Nearest codes, elementwise (shapes broadcast), in the dtype of ``values``."""
    return torch.clamp(torch.round(values / scales) + zero_points, 0, 2**bits - 1)


def fit_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    importance: Tensor | None = None,
    clip_search: bool = True,
    norm: float = 2.4,
    max_shrink: float = 0.8,
    steps: int = 100,
) -> Grid:
    """Fit scales and zero points to a weight, group by group.

    Starts from the range of each group and, with ``clip_search``, shrinks it as long as
    ``sum_k importance_k |w_k - q_k| ** norm`` of the group falls (Frantar et al., GPTQ,
    arXiv 2210.17323, reference implementation; weighting by the Hessian's diagonal aims the
    search at the inputs that occur).

    Args:
        weight: float ``[N, K]``, finite.
        bits: width of a code.
        group_size: columns per group, ``1 <= group_size <= K``.
        symmetric: fix the zero point at ``2**(bits - 1)``.
        importance: non-negative float ``[K]``; uniform when absent.
        clip_search: shrink ranges; otherwise each group's full range is used.
        norm: exponent of the error the search minimises.
        max_shrink: largest fraction taken off the range.
        steps: number of ranges tried.

    Returns:
        The grid; scales are float32 values, so that codes computed here and weights
        dequantized anywhere else agree bit for bit.
    """
    columns = weight.shape[1]
    groups = -(-columns // group_size)
    padding = groups * group_size - columns
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    mass = torch.nn.functional.pad(importance.to(torch.float64), (0, padding))
    mass = mass.reshape(groups, group_size)
    shrinks = round(max_shrink * steps) if clip_search else 0
    keeps = [1.0 - step / steps for step in range(shrinks + 1)]
    scales, zeros = [], []
    # Rows are independent; a few at a time stay in the processor's cache.
    for chunk in torch.split(weight, max(1, _CHUNK // columns)):
        values = torch.nn.functional.pad(chunk.to(torch.float64), (0, padding))
        values = values.reshape(-1, groups, group_size)
        scale, zero = _best_affine(values, mass, keeps, bits, symmetric, norm)
        scales.append(scale)
        zeros.append(zero)
    return Grid(
        scales=torch.cat(scales).to(torch.float32),
        zero_points=torch.cat(zeros).to(torch.uint8),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )


def _best_affine(
    values: Tensor, mass: Tensor, keeps: list[float], bits: int, symmetric: bool, norm: float
) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[n, G]`` of the best share of each group's range.

    ``values [n, G, group_size]``, ``mass [G, group_size]``; ``keeps`` are the shares to try.
    """
    low = values.amin(dim=2, keepdim=True).clamp(max=0.0)
    high = values.amax(dim=2, keepdim=True).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best_scale, best_zero = _affine(low, high, bits, symmetric)
    if len(keeps) > 1:
        best_error = _grid_error(values, best_scale, best_zero, bits, mass, norm)
        for keep in keeps[1:]:
            scale, zero = _affine(low * keep, high * keep, bits, symmetric)
            error = _grid_error(values, scale, zero, bits, mass, norm)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale.squeeze(2), best_zero.squeeze(2)


def _affine(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[low, high]``; an empty range gets scale 1."""
    span = high - low
    # Rounded to float32 here so that the error below is that of the stored scale.
    scale = (span / (2**bits - 1)).to(torch.float32).to(torch.float64)
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, torch.clamp(torch.round(-low / scale), 0, 2**bits - 1)


def _grid_error(
    values: Tensor, scale: Tensor, zero: Tensor, bits: int, mass: Tensor, norm: float
) -> Tensor:
    codes = quantize_to_codes(values, scale, zero, bits)
    error = ((codes - zero) * scale - values).abs_().pow_(norm)
    return (error * mass).sum(dim=2, keepdim=True)
