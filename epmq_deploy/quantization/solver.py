"""The one solver: codes that minimise ``tr((Q - W) H (Q - W)^T)`` on a given grid.

GPTQ (Frantar et al., arXiv 2210.17323) with static groups and act-order. Which ``W`` and ``H``
go in decides the method (see ``epmq_deploy.calibration.targets``).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.quantization.grid import Grid, expand_groups, quantize_to_codes

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
    """

    codes: Tensor
    status: Status
    added_damping: float


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr((Q - W) H (Q - W)^T)`` in float64; ``weight, quantized [N, K]``, ``hessian [K, K]``."""
    error = quantized.to(torch.float64) - weight.to(torch.float64)
    return float(((error @ hessian.to(torch.float64)) * error).sum())


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest codes, uint8 ``[N, K]``."""
    scale, zero = _per_column(grid, weight.shape[1])
    return quantize_to_codes(weight.to(torch.float64), scale, zero, grid.bits).to(torch.uint8)


def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = True,
    block_size: int = 32,
    allow_fallback: bool = False,
) -> Solution:
    """Quantize column by column, passing each column's error on to those still open.

    With ``U`` the upper Cholesky factor of ``H^-1``, column ``c`` leaves
    ``e = (w_c - q_c) / U_cc`` and the open columns become ``w - e U[c]``. The result does not
    depend on ``block_size``, which only sets how much is updated lazily.

    Args:
        weight: float ``[N, K]``, the target ``W``; left unmodified.
        hessian: ``[K, K]``, symmetric positive definite; left unmodified.
        grid: static groups in original column order.
        act_order: process columns by decreasing diagonal of ``H``.
        block_size: columns per lazy update.
        allow_fallback: round to nearest instead of failing when ``H`` cannot be factored.

    Raises:
        NumericsError: ``W`` or ``H`` not finite, or ``H`` not positive definite even with a
            damping of its mean diagonal.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise NumericsError("the target or the Hessian holds NaN or infinite values")
    full_hessian = hessian.to(torch.float64)
    full_hessian = (full_hessian + full_hessian.T) / 2
    columns = weight.shape[1]
    if act_order:
        order = torch.argsort(full_hessian.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(columns, device=weight.device)
    factored = _inverse_cholesky(full_hessian[order][:, order])
    if factored is None:
        if not allow_fallback:
            raise NumericsError(
                "the Hessian is not positive definite even after adding its mean diagonal; "
                "use more calibration samples or a larger damping/anchor"
            )
        return Solution(round_to_nearest(weight, grid), "fallback_rtn", 0.0)
    upper, added = factored

    # Indexing copies, so the caller's tensors stay as they are.
    open_weight = weight.to(torch.float64)[:, order]
    scale, zero = (part[:, order] for part in _per_column(grid, columns))
    codes = _quantize_columns(open_weight, upper, scale, zero, grid.bits, block_size)
    result = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    result[:, order] = codes.to(torch.uint8)
    return Solution(result, "damping_raised" if added else "solved", added)


def _quantize_columns(
    open_weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, bits: int, block_size: int
) -> Tensor:
    """Codes of all columns in turn, float64 ``[N, K]``; ``open_weight`` is used up."""
    codes = torch.empty_like(open_weight)
    columns = codes.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty_like(open_weight[:, start:stop])
        for c in range(start, stop):
            codes[:, c] = quantize_to_codes(open_weight[:, c], scale[:, c], zero[:, c], bits)
            value = (codes[:, c] - zero[:, c]) * scale[:, c]
            error = (open_weight[:, c] - value) / upper[c, c]
            errors[:, c - start] = error
            open_weight[:, c + 1 : stop] -= error[:, None] * upper[c, c + 1 : stop]
        open_weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def _per_column(grid: Grid, columns: int) -> tuple[Tensor, Tensor]:
    scale = expand_groups(grid.scales.to(torch.float64), grid.group_size, columns)
    zero = expand_groups(grid.zero_points.to(torch.float64), grid.group_size, columns)
    return scale, zero


def _inverse_cholesky(hessian: Tensor) -> tuple[Tensor, float] | None:
    """Upper Cholesky factor of ``H^-1`` and the damping it took, or None."""
    mean = float(hessian.diagonal().mean())
    if mean <= 0:
        return None
    for relative in (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0):
        added = relative * mean
        damped = hessian.clone()
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        inverse = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return upper, added
    return None
