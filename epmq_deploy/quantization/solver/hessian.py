"""The Hessian of layers that share an input, factored once for all of them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Damping tried in turn, relative to the mean diagonal.
_DAMPING = (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)
# Columns per matrix product of a quadratic form.
_BLOCK = 256


@dataclass(frozen=True)
class Factor:
    """``H + added I`` with rows and columns taken in ``order`` is ``lower lower^T``.

    Attributes:
        lower: ``[K, K]``, lower triangular, in the Hessian's dtype.
        order: int64 ``[K]``; the solver fixes its last entry first.
        added: what was added to the diagonal, in the Hessian's units; 0 when not needed.
    """

    lower: Tensor
    order: Tensor
    added: float


class Hessian:
    """``H`` of ``tr((Q - W*) H (Q - W*)^T)``; factored on first use, once.

    Attributes:
        matrix: ``H``, ``[K, K]``, symmetric; never modified. Factor, target and codes are computed
            in its dtype.
        act_order: columns with the largest diagonal are fixed first, otherwise the first ones.
    """

    def __init__(
        self, matrix: Tensor, *, act_order: bool = True, dtype: torch.dtype = torch.float64
    ) -> None:
        self.matrix = matrix.to(dtype)
        self.act_order = act_order

    @cached_property
    def finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        # One NaN or infinity makes the sum NaN or infinite; no mask the size of H is needed.
        return bool(torch.isfinite(self.matrix.sum()))

    @cached_property
    def factor(self) -> Factor | None:
        """The Cholesky factor with the least damping that works; None where none does."""
        diagonal = self.matrix.diagonal()
        mean = float(diagonal.mean())
        if not self.finite or mean <= 0:
            return None
        if self.act_order:
            order = torch.argsort(diagonal, descending=True, stable=True).flip(0)
        else:
            order = torch.arange(len(diagonal) - 1, -1, -1, device=diagonal.device)
        # Symmetric, and column by column as LAPACK wants it.
        ordered = self.matrix[order].index_select(1, order).T
        for relative in _DAMPING:
            added = relative * mean
            # From the original diagonal, or the dampings tried would add up.
            damped = diagonal[order] + added
            ordered.diagonal().copy_(damped)
            lower, failed = torch.linalg.cholesky_ex(ordered)
            # Reject pivots that are only rounding noise around zero.
            least = len(diagonal) * torch.finfo(damped.dtype).eps * damped
            if not int(failed) and bool((lower.diagonal().square() > least).all()):
                return Factor(lower, order, added)
        return None

    @cached_property
    def damped(self) -> Tensor:
        """``H`` with the damping its factor took."""
        if self.factor is None or self.factor.added == 0:
            return self.matrix
        damped = self.matrix.clone()
        damped.diagonal().add_(self.factor.added)
        return damped

    def solve(self, right: Tensor, anchor: Tensor) -> Tensor:
        """Return ``W*`` with ``W* H = right``; damping, where needed, pulls it towards ``anchor``.

        Args:
            right: float ``[N, K]``.
            anchor: float ``[N, K]``; the result where ``H`` cannot be factored.
        """
        if self.factor is None:
            return anchor.to(self.matrix.dtype)
        lower, order, added = self.factor.lower, self.factor.order, self.factor.added
        right = right.to(lower.dtype)
        if added:
            right = right + added * anchor.to(lower.dtype)
        # Stored column by column, the order in which the solver reads it.
        half = torch.linalg.solve_triangular(lower.T, right[:, order], upper=True, left=False)
        columns = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
        solved = torch.empty(right.T.shape, dtype=right.dtype, device=right.device)
        solved[order] = columns.T
        return solved.T

    def quadratic(self, error: Tensor) -> float:
        """Return ``tr(error H error^T)``, computed in the dtype of ``error``, float ``[N, K]``."""
        matrix = self.matrix.to(error.dtype)
        total = torch.zeros((), dtype=torch.float64, device=error.device)
        for start in range(0, error.shape[1], _BLOCK):
            block = slice(start, start + _BLOCK)
            # H is symmetric: entries below the diagonal count as much as those above.
            weighted = 2 * (error[:, :start] @ matrix[:start, block])
            weighted += error[:, block] @ matrix[block, block]
            total += (weighted * error[:, block]).sum(dtype=torch.float64)
        return float(total)


class Identity(Hessian):
    """``H = I``, for methods without calibration data."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(torch.eye(columns, dtype=torch.float64, device=device))

    def quadratic(self, error: Tensor) -> float:
        """Return ``tr(error error^T)`` without the product with ``I``."""
        return float(error.to(torch.float64).square().sum())


class GroupHessian:
    """``H`` of one group of layers, for layers without and with a free bias.

    Attributes:
        plain: ``H`` itself.
    """

    def __init__(self, plain: Hessian, mean: Tensor, weight: float) -> None:
        """Hold ``H`` with what eliminating a bias takes.

        Args:
            plain: ``H``.
            mean: ``sum s_t mu_t``, float64 ``[K]``.
            weight: ``sum s_t`` plus the pull on the bias.
        """
        self.plain = plain
        self._mean = mean
        self._weight = weight

    @cached_property
    def centred(self) -> Hessian:
        """``H - mean mean^T / weight``: every ``Q`` comes with the bias that is best for it.

        Minimising ``tr(Q H Q^T) + 2 (Q mean)^T b + weight b^T b`` and linear terms over ``b``
        leaves this quadratic in ``Q``.
        """
        if self._weight <= 0:
            return self.plain
        matrix = torch.addr(self.plain.matrix, self._mean, self._mean, alpha=-1 / self._weight)
        dtype = self.plain.matrix.dtype
        return Hessian(matrix, act_order=self.plain.act_order, dtype=dtype)
