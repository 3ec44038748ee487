"""The one solver: find codes that minimise ``tr((Q - W) H (Q - W)^T)`` on a given grid.

GPTQ (Frantar et al., arXiv 2210.17323) with static groups and act-order. Which ``W`` and ``H``
it is given decides the method (see ``epmq_deploy.quantization.methods``).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.quantization.solver.grid import Grid, expand_groups, quantize_to_codes
from epmq_deploy.quantization.solver.hessian import Factor, Hessian
from epmq_deploy.quantization.solver.rounding import ROUND

# Columns per matrix product outside of blocks: fewer leave the processor waiting for memory.
PANEL = 256

Status = Literal["solved", "damping_raised", "fallback_rtn"]


@dataclass(frozen=True)
class Solution:
    """Codes of one layer and how they were found.

    Attributes:
        codes: uint8 ``[N, K]``, original column order.
        status: ``solved`` as asked; ``damping_raised`` when the Hessian needed more damping;
            ``fallback_rtn`` when it could not be factored and rounding was allowed instead.
        added_damping: what was added to the Hessian's diagonal to factor it, in the Hessian's
            units; 0 when solved as asked.
        objective: ``tr((Q - W) H (Q - W)^T)`` with that damping.
    """

    codes: Tensor
    status: Status
    added_damping: float
    objective: float


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Return the nearest codes, uint8 ``[N, K]``."""
    scale, zero = _per_column(grid, weight.shape[1])
    return quantize_to_codes(weight.to(torch.float64), scale, zero, grid.bits).to(torch.uint8)


def rounding_error(weight: Tensor, grid: Grid) -> Tensor:
    """Return the error of rounding a weight to nearest, float32 ``[N, K]``."""
    values = weight.T.to(torch.float32, memory_format=torch.contiguous_format)
    error = torch.empty_like(values)
    scales = grid.scales.T.contiguous()
    zeros = grid.zero_points.T.to(torch.float32)
    for group, start in enumerate(range(0, len(values), grid.group_size)):
        part, scale, zero = slice(start, start + grid.group_size), scales[group], zeros[group]
        codes = quantize_to_codes(values[part], scale, zero, grid.bits)
        error[part] = codes.sub_(zero).mul_(scale).sub_(values[part])
    return error.T


def solve(
    weight: Tensor,
    hessian: Hessian,
    grid: Grid,
    *,
    block_size: int = 32,
    allow_fallback: bool = False,
) -> Solution:
    """Quantize column by column, each to the best value given the errors of those before it.

    With ``H = L L^T`` the objective is ``sum_c (sum_{j >= c} e_j L_jc)^2`` for the errors
    ``e = q - w``. Column ``c``, taken from the last to the first, is rounded from
    ``w_c - sum_{j > c} e_j L_jc / L_cc``. That is GPTQ in reverse order without inverting ``H``
    (Babai's nearest plane; Chen et al., arXiv 2507.18553). The result does not depend on
    ``block_size``, which only sets how many columns share one matrix product.

    Args:
        weight: float ``[N, K]``, the target ``W``; left unmodified.
        hessian: symmetric positive definite, with the order of columns; left unmodified.
        grid: static groups in original column order.
        block_size: columns per matrix product within panels of columns.
        allow_fallback: round to nearest instead of failing when ``H`` cannot be factored.

    Raises:
        NumericsError: ``W`` or ``H`` not finite, or ``H`` not positive definite even with a
            damping of its mean diagonal.
    """
    if not (hessian.finite and bool(torch.isfinite(weight).all())):
        raise NumericsError("the target or the Hessian holds NaN or infinite values")
    factor = hessian.factor
    if factor is None:
        if not allow_fallback:
            raise NumericsError(
                "the Hessian is not positive definite even after adding its mean diagonal; "
                "use more calibration samples or a larger damping/anchor"
            )
        codes = round_to_nearest(weight, grid)
        error = dequantize(codes, grid) - weight
        return Solution(codes, "fallback_rtn", 0.0, hessian.quadratic(error))
    codes, objective = _quantize_columns(weight, factor, grid, block_size)
    status: Status = "damping_raised" if factor.added else "solved"
    return Solution(codes, status, factor.added, objective)


def _quantize_columns(
    weight: Tensor, factor: Factor, grid: Grid, block_size: int
) -> tuple[Tensor, float]:
    """Return the codes of all columns, uint8 ``[N, K]``, and their objective."""
    lower, order = factor.lower, factor.order
    # One row per column, so that every column is contiguous.
    targets = weight.to(lower.dtype).T[order]
    work = _Columns(targets, lower, order, grid)
    objective = torch.zeros((), dtype=torch.float64, device=weight.device)
    for stop in range(len(order), 0, -PANEL):
        start = max(stop - PANEL, 0)
        pivots = lower.diagonal()[start:stop, None]
        centres = lower[stop:, start:stop].T @ work.errors[stop:]
        centres = targets[start:stop] - centres / pivots
        for last in range(stop, start, -block_size):
            first = max(last - block_size, start)
            inner = lower[last:stop, first:last].T @ work.errors[last:stop]
            block = centres[first - start : last - start]
            block -= inner / lower.diagonal()[first:last, None]
            work.quantize(block, first, last)
        missed = work.errors[start:stop] + targets[start:stop] - centres
        objective += (missed * pivots).square().sum(dtype=torch.float64)
    codes = torch.empty(targets.shape, dtype=torch.uint8, device=weight.device)
    zeros = grid.zero_points.T.to(targets.dtype)
    codes[order] = work.steps.add_(zeros[order // grid.group_size]).to(torch.uint8)
    return codes.T.contiguous(), float(objective)


class _Columns:
    """Columns being quantized, one per row, in the factor's order.

    Attributes:
        steps: codes minus zero points, ``[K, N]``, in the factor's dtype.
        errors: quantized minus target values, ``[K, N]``, in the factor's dtype.
    """

    def __init__(self, targets: Tensor, lower: Tensor, order: Tensor, grid: Grid) -> None:
        self.steps, self.errors = torch.empty_like(targets), torch.empty_like(targets)
        scales = grid.scales.T.contiguous().to(targets.dtype)
        zeros = grid.zero_points.T.contiguous().to(targets.dtype)
        self._round = ROUND[targets.dtype]
        # Indexing tensors row by row would take as long as the arithmetic.
        self._rows = [part.unbind() for part in (self.steps, self.errors, targets)]
        bounds = (self._round - zeros, self._round + 2**grid.bits - 1 - zeros)
        self._grid = [part.unbind() for part in (scales, 1 / scales, *bounds)]
        self._groups = (order // grid.group_size).tolist()
        self._pivots = lower.diagonal().tolist()
        self._lower = lower
        self._zero = torch.full_like(targets[0], self._round)

    def quantize(self, centres: Tensor, first: int, last: int) -> None:
        """Quantize columns ``first`` to ``last``, beginning with the last one.

        ``centres`` are the values that they are rounded from; changed in place to count errors
        within the block.
        """
        all_steps, all_errors, all_targets = self._rows
        scales, inverses, least, most = self._grid
        # Contiguous columns of the factor's block.
        factors = self._lower[first:last, first:last].T.contiguous().unbind()
        errors = self.errors[first:last]
        centre_rows = centres.unbind()
        for c in range(last - 1, first - 1, -1):
            index, group = c - first, self._groups[c]
            centre = centre_rows[index]
            if c + 1 < last:
                column = factors[index][index + 1 :]
                centre.addmv_(errors[index + 1 :].T, column, alpha=-1 / self._pivots[c])
            step, error = all_steps[c], all_errors[c]
            torch.addcmul(self._zero, centre, inverses[group], out=step)
            torch.clamp(step, least[group], most[group], out=step).sub_(self._round)
            torch.mul(step, scales[group], out=error).sub_(all_targets[c])


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Return ``(code - zero_point) * scale``, float64 ``[N, K]``, not rounded to float32."""
    scale, zero = _per_column(grid, codes.shape[1])
    return (codes.to(torch.float64) - zero) * scale


def _per_column(grid: Grid, columns: int) -> tuple[Tensor, Tensor]:
    scale = expand_groups(grid.scales.to(torch.float64), grid.group_size, columns)
    zero = expand_groups(grid.zero_points.to(torch.float64), grid.group_size, columns)
    return scale, zero
