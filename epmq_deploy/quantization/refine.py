"""Lowering the exact objective after the solver: codes and scales in turn, never upwards.

The solver fixes each column once, in order. With all columns fixed, ``tr((Q - W) H (Q - W)^T)`` is
known exactly, and both the codes (scales fixed) and the scales (codes fixed) can be improved one at
a time: each is a one-dimensional quadratic with a closed-form minimum.
"""

import torch
from torch import Tensor

from epmq_deploy.quantization.grid import Grid, expand_groups, quantize_to_codes
from epmq_deploy.quantization.solver import objective


def refine(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    *,
    sweeps: int,
    tolerance: float = 1e-3,
    block_size: int = 32,
) -> tuple[Tensor, Grid]:
    """Alternate coordinate descent over codes and refits of scales.

    Args:
        weight: the target ``W*``, ``[N, K]``.
        hessian: ``[K, K]``, symmetric positive definite.
        codes: uint8 ``[N, K]`` to start from; left unmodified.
        grid: the grid they are on; left unmodified.
        sweeps: most rounds over all columns and groups.
        tolerance: stop when a round lowers the objective by less than this share.
        block_size: columns per lazy update; does not change the result.

    Returns:
        Codes and grid whose objective is at most that of the inputs.
    """
    full = hessian.to(torch.float64)
    target = weight.to(torch.float64)
    columns = weight.shape[1]
    zero = expand_groups(grid.zero_points.to(torch.float64), grid.group_size, columns)
    steps = codes.to(torch.float64) - zero
    scales = grid.scales.to(torch.float64)
    error = steps * expand_groups(scales, grid.group_size, columns) - target
    before = objective(torch.zeros_like(error), error, full)
    for _ in range(sweeps):
        gradient = error @ full
        step_size = expand_groups(scales, grid.group_size, columns)
        _descend_codes(steps, error, gradient, full, step_size, zero, grid.bits, block_size)
        scales = _refit_scales(steps, error, gradient, full, scales, grid.group_size)
        # Recomputed so that rounding in the running updates cannot add up.
        error = steps * expand_groups(scales, grid.group_size, columns) - target
        after = objective(torch.zeros_like(error), error, full)
        if after > before * (1 - tolerance):
            break
        before = after
    refined = Grid(
        scales.to(torch.float32), grid.zero_points, grid.bits, grid.group_size, grid.symmetric
    )
    return (steps + zero).to(torch.uint8), refined


def _descend_codes(
    steps: Tensor,
    error: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    step_size: Tensor,
    zero: Tensor,
    bits: int,
    block_size: int,
) -> None:
    """Give every code in turn the value that is best with all others fixed; in place.

    ``steps`` (codes minus zero points), ``error = Q - W`` and ``gradient = error H`` are ``[N, K]``
    and kept up to date.
    """
    columns = steps.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        moves = torch.zeros_like(steps[:, start:stop])
        local = gradient[:, start:stop].clone()
        for c in range(start, stop):
            scale, offset = step_size[:, c], zero[:, c]
            wanted = steps[:, c] * scale - local[:, c - start] / hessian[c, c]
            new = quantize_to_codes(wanted, scale, offset, bits) - offset
            move = (new - steps[:, c]) * scale
            steps[:, c] = new
            moves[:, c - start] = move
            local += move[:, None] * hessian[c, start:stop]
        error[:, start:stop] += moves
        gradient += moves @ hessian[start:stop]


def _refit_scales(
    steps: Tensor,
    error: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    scales: Tensor,
    group_size: int,
) -> Tensor:
    """Give every group in turn its best scale with all else fixed; new scales ``[N, G]``.

    A scale only changes to a positive float32 value that lowers the objective. ``error`` and
    ``gradient`` are kept up to date in place.
    """
    refitted = scales.clone()
    columns = steps.shape[1]
    for group, start in enumerate(range(0, columns, group_size)):
        stop = min(start + group_size, columns)
        part = steps[:, start:stop]
        slope = (part * gradient[:, start:stop]).sum(dim=1)
        curvature = ((part @ hessian[start:stop, start:stop]) * part).sum(dim=1)
        old = refitted[:, group]
        best = old - slope / curvature.clamp(min=torch.finfo(torch.float64).tiny)
        new = best.to(torch.float32).to(torch.float64)
        change = new - old
        better = (new > 0) & (2 * change * slope + change.square() * curvature < 0)
        change = torch.where(better, change, torch.zeros_like(change))
        refitted[:, group] = old + change
        move = part * change[:, None]
        error[:, start:stop] += move
        gradient += move @ hessian[start:stop]
    return refitted
