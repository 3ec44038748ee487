"""Lowering the exact objective after the solver: codes and scales in turn, never upwards.

The solver fixes each column once, in order. With all columns fixed, ``tr((Q - W) H (Q - W)^T)`` is
known exactly, and both the codes (scales fixed) and the scales (codes fixed) can be improved one at
a time: each is a one-dimensional quadratic with a closed-form minimum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.quantization.solver.gptq import PANEL
from epmq_deploy.quantization.solver.grid import Grid
from epmq_deploy.quantization.solver.rounding import ROUND


@dataclass(frozen=True)
class Refinement:
    """Codes and grid after refinement.

    Attributes:
        codes: uint8 ``[N, K]``.
        grid: with new scales.
        objective: ``tr((Q - W) H (Q - W)^T)`` of the two.
    """

    codes: Tensor
    grid: Grid
    objective: float


def refine(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    *,
    objective: float,
    sweeps: int,
    tolerance: float = 1e-3,
    block_size: int = 32,
) -> Refinement:
    """Alternate refits of scales and coordinate descent over codes, group by group.

    Args:
        weight: the target ``W*``, float ``[N, K]``; left unmodified.
        hessian: ``[K, K]``, symmetric positive definite; everything is computed in its dtype.
        codes: uint8 ``[N, K]`` to start from; left unmodified.
        grid: the grid they are on; left unmodified.
        objective: of these codes; only decides when to stop.
        sweeps: most rounds over all columns and groups.
        tolerance: stop when a round lowers the objective by less than this share.
        block_size: columns per matrix product; does not change the result.

    Returns:
        Codes and grid whose objective is at most that of the inputs.
    """
    state = _State(weight, hessian, codes, grid, block_size)
    for _ in range(sweeps):
        gain = state.sweep()
        objective -= gain
        if gain <= tolerance * objective:
            break
    refined = Grid(
        state.scales.T.contiguous().to(torch.float32),
        grid.zero_points,
        grid.bits,
        grid.group_size,
        grid.symmetric,
    )
    return Refinement(state.codes(), refined, objective)


class _State:
    """Codes, scales and errors, one contiguous row per column of the weight.

    Attributes:
        scales: ``[G, N]``, float32 values in the Hessian's dtype, as all tensors here.
        zeros: ``[G, N]``.
        steps: codes minus zero points, ``[K, N]``.
        errors: ``Q - W``, ``[K, N]``.
    """

    def __init__(
        self, weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, block_size: int
    ) -> None:
        self.hessian, self.block_size = hessian, block_size
        self.round = ROUND[hessian.dtype]
        self.scales = grid.scales.to(hessian.dtype).T.contiguous()
        self.zeros = grid.zero_points.to(hessian.dtype).T.contiguous()
        self.least, self.most = -self.zeros, 2**grid.bits - 1 - self.zeros
        self.curvatures = self.hessian.diagonal().tolist()
        columns = len(self.curvatures)
        starts = range(0, columns, grid.group_size)
        self.groups = [slice(start, min(start + grid.group_size, columns)) for start in starts]
        self.steps = codes.T.to(hessian.dtype, memory_format=torch.contiguous_format)
        self.errors = torch.empty_like(self.steps)
        for group, part in enumerate(self.groups):
            self.steps[part] -= self.zeros[group]
            self.errors[part] = self.steps[part] * self.scales[group]
        self.errors -= weight.T.to(hessian.dtype)

    def sweep(self) -> float:
        """Improve every scale and every code once; return how much the objective fell."""
        gain = torch.zeros((), dtype=torch.float64, device=self.errors.device)
        per_panel = max(1, PANEL // (self.groups[0].stop - self.groups[0].start))
        for first in range(0, len(self.groups), per_panel):
            groups = self.groups[first : first + per_panel]
            panel = slice(groups[0].start, groups[-1].stop)
            # Computed afresh, so that rounding in running updates cannot add up.
            gradients = self.hessian[panel] @ self.errors
            old = self.errors[panel].clone()
            for group, part in enumerate(groups, first):
                done = slice(panel.start, part.start)
                changed = self.errors[done] - old[: part.start - panel.start]
                gradient = gradients[part.start - panel.start : part.stop - panel.start]
                gradient += self.hessian[part, done] @ changed
                gain += self._refit_scales(group, part, gradient)
                gain += self._descend_codes(group, part, gradient)
        return float(gain)

    def _refit_scales(self, group: int, part: slice, gradient: Tensor) -> Tensor:
        """Give one group of every row its best scale with all else fixed.

        A scale only changes to a positive float32 value that lowers the objective. ``gradient``,
        ``[group_size, N]``, is kept up to date.
        """
        steps, old = self.steps[part], self.scales[group]
        pull = self.hessian[part, part] @ steps
        slope = (steps * gradient).sum(dim=0)
        curvature = (steps * pull).sum(dim=0)
        best = old - slope / curvature.clamp(min=torch.finfo(old.dtype).tiny)
        new = best.to(torch.float32).to(old.dtype)
        change = new - old
        gain = -change * (2 * slope + change * curvature)
        better = (new > 0) & (gain > 0)
        change = torch.where(better, change, 0.0)
        self.scales[group] = old + change
        gradient.addcmul_(pull, change)
        self.errors[part].addcmul_(steps, change)
        return torch.where(better, gain, 0.0).sum()

    def _descend_codes(self, group: int, part: slice, gradient: Tensor) -> Tensor:
        """Give every code of a group in turn the value that is best with all others fixed.

        ``gradient`` is overwritten: each row ends as it was when its code was chosen.
        """
        hessian = self.hessian[part, part]
        curvatures = self.curvatures[part]
        scale, inverse = self.scales[group], 1 / self.scales[group]
        least, most = self.round + self.least[group], self.round + self.most[group]
        # Steps are held with this constant added, so that every sum is rounded to whole steps.
        steps = self.steps[part] + self.round
        new, moves = torch.empty_like(steps), torch.empty_like(steps)
        # Indexing tensors row by row would take as long as the arithmetic.
        rows = list(
            zip(gradient.unbind(), steps.unbind(), new.unbind(), moves.unbind(), strict=True)
        )
        for start in range(0, len(curvatures), self.block_size):
            stop = min(start + self.block_size, len(curvatures))
            gradient[start:stop] += hessian[start:stop, :start] @ moves[:start]
            weights = hessian[start:stop, start:stop].contiguous().unbind()
            for c in range(start, stop):
                slope, step, best, move = rows[c]
                if c > start:
                    slope.addmv_(moves[start:c].T, weights[c - start][: c - start])
                torch.addcmul(step, slope, inverse, value=-1 / curvatures[c], out=best)
                torch.clamp(best, least, most, out=best)
                torch.sub(best, step, out=move).mul_(scale)
        self.errors[part] += moves
        torch.sub(new, self.round, out=self.steps[part])
        diagonal = self.hessian.diagonal()[part, None]
        return -(moves * (2 * gradient + diagonal * moves)).sum()

    def codes(self) -> Tensor:
        """Return the codes, uint8 ``[N, K]``."""
        for group, part in enumerate(self.groups):
            self.steps[part] += self.zeros[group]
        return self.steps.T.to(torch.uint8, memory_format=torch.contiguous_format)
