"""The best correction of rank r of one quantized layer for one task.

With Gram matrix ``C`` and mean ``mu`` of the student's inputs, cross moments ``G`` with the outputs
that the task aims at, and the quantized weight ``Q``, the task's own weight is the ridge regression
anchored at ``Q``:

    T = argmin  mean || T x - y ||^2 + lambda || T - Q ||^2  =  Q + (G - Q C) (C + lambda I)^-1

and of all corrections of rank r the one with the least ``|| (T - Q - D) (C + lambda I)^(1/2) ||_F``
is ``D = SVD_r((T - Q) L) L^-1`` with ``C + lambda I = L L^T``. Where the layer has a bias, all
moments are centred, which is the same as fitting the bias jointly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.quantization.residuals.factors import TaskCorrection, rounded

# By how much damping is raised where a matrix cannot be factored, and how often.
_RAISE, _RAISES = 4.0, 16


@dataclass(frozen=True)
class TaskMoments:
    """One task's moments of a layer's inputs ``x`` and of the outputs ``y`` aimed at.

    Attributes:
        gram: ``C``, mean of ``x x^T``, ``[K, K]``.
        cross: ``G``, mean of ``y x^T``, without bias in ``y``, ``[N, K]``.
        mean: of ``x``, ``[K]``.
        output_mean: of ``y``, without bias, ``[N]``.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    output_mean: Tensor

    def centred(self) -> "TaskMoments":
        """Return the moments of ``x`` and ``y`` less their means."""
        mean, output_mean = self.mean.to(self.gram.dtype), self.output_mean.to(self.gram.dtype)
        return TaskMoments(
            self.gram - torch.outer(mean, mean),
            self.cross - torch.outer(output_mean, mean),
            torch.zeros_like(mean),
            torch.zeros_like(output_mean),
        )

    def double(self) -> "TaskMoments":
        """Return them in float64."""
        return TaskMoments(
            self.gram.double(), self.cross.double(), self.mean.double(), self.output_mean.double()
        )


def damped_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of ``C + lambda I``.

    Args:
        gram: ``C``, float64 ``[K, K]``.
        damping: lambda relative to the inputs' mean square; raised as far as rounded sums need it.

    Raises:
        NumericsError: no damping helps, as values are not finite.
    """
    square = float(gram.diagonal().mean())
    # Inputs that are all zero leave nothing to correct, whatever the damping.
    strength = damping * square if square > 0 else 1.0
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(_RAISES):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram + strength * eye)
        if not failed:
            return factor
        strength *= _RAISE
    raise NumericsError("a task's Gram matrix is not finite")


def task_weight(quantized: Tensor, moments: TaskMoments, damping: float) -> Tensor:
    """Return ``T``, float64 ``[N, K]``, the task's own regression anchored at ``quantized``."""
    moments = moments.double()
    q = quantized.double()
    factor = damped_factor(moments.gram, damping)
    missing = moments.cross - q @ moments.gram
    return q + torch.cholesky_solve(missing.T, factor).T


def whitened_svd(
    quantized: Tensor, moments: TaskMoments, damping: float, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A [N, r]``, ``B [r, K]`` and all singular values of ``(T - Q) L``, float64.

    ``A B`` is the correction; the rows of ``B L`` are orthonormal.
    """
    moments = moments.double()
    factor = damped_factor(moments.gram, damping)
    missing = moments.cross - quantized.double() @ moments.gram
    # (T - Q) L = missing (L L^T)^-1 L = missing L^-T
    whitened = torch.linalg.solve_triangular(factor, missing.T, upper=False).T
    u, sizes, vt = torch.linalg.svd(whitened, full_matrices=False)
    right = torch.linalg.solve_triangular(factor, vt[:rank], upper=False, left=False)
    return u[:, :rank] * sizes[:rank], right, sizes


def fit_correction(
    quantized: Tensor,
    moments: TaskMoments,
    *,
    rank: int,
    damping: float,
    bias_gap: Tensor | None = None,
) -> TaskCorrection:
    """Return one task's correction of one layer.

    ``B`` is rounded first; then ``A`` is the least-squares solution for the rounded ``B``.

    Args:
        quantized: ``Q``, ``[N, K]``.
        moments: of the task.
        rank: ``r``, at most ``min(N, K)``.
        damping: lambda, relative to the inputs' mean square.
        bias_gap: the expert's bias less the layer's, ``[N]``; None without a bias.

    Raises:
        NumericsError: the moments are not finite.
    """
    fitted = moments.double() if bias_gap is None else moments.double().centred()
    q = quantized.double()
    _, right, _ = whitened_svd(q, fitted, damping, rank)
    codes, steps = rounded(right, 1)
    left_codes, left_steps = rounded(
        _left_for(codes * steps[:, None].double(), q, fitted, damping), 0
    )
    scales = left_steps * steps
    if bias_gap is None:
        return TaskCorrection(left_codes, codes, scales)
    corrected = q + (left_codes.double() * scales) @ codes.double()
    means = moments.double()
    bias = means.output_mean - corrected @ means.mean + bias_gap.double()
    return TaskCorrection(left_codes, codes, scales, bias)


def _left_for(right: Tensor, q: Tensor, moments: TaskMoments, damping: float) -> Tensor:
    """Return the ``A [N, r]`` with the least ``|| (T - Q - A B) L ||_F``.

    ``A = M B^T (B C' B^T)^-1`` with ``M = (T - Q) C' = G - Q C`` and ``C' = C + lambda I``.
    """
    images = right @ damped_factor(moments.gram, damping)
    products = images @ images.T
    # Rows that were rounded to nothing take no part.
    size = float(products.diagonal().mean())
    products.diagonal().add_(1e-12 * size if size > 0 else 1.0)
    missing = moments.cross - q @ moments.gram
    left: Tensor = torch.linalg.solve(products, right @ missing.T)
    return left.T
