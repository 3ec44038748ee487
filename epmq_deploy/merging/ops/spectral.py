"""Singular vectors of task matrices.

Decompositions go through the Gram matrix of the shorter side in float64: for float32 matrices that
is as exact as a direct decomposition for all directions that matter, and several times faster.
"""

from typing import Literal

import torch
from torch import Tensor

# Directions below this share of the largest singular value are rounding errors, not directions.
_NULL = 1e-5


def top_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values of ``matrix [m, n]`` with their vectors, float32.

    Returns:
        ``U [m, rank]``, ``s [rank]`` descending, ``V^T [rank, n]``; vectors of vanishing singular
        values are zero.
    """
    rows, columns = matrix.shape
    if rows > columns:
        left, values, right = top_triplets(matrix.T, rank)
        return right.T, values, left.T
    exact = matrix.to(torch.float64)
    squares, vectors = torch.linalg.eigh(exact @ exact.T)
    values = squares[-rank:].flip(0).clamp(min=0).sqrt()
    left = vectors[:, -rank:].flip(1)
    inverse = torch.where(values > _NULL * values[0], 1 / values, 0.0)
    right = inverse[:, None] * (left.T @ exact)
    left = left * (inverse != 0)
    return left.float(), values.float(), right.float()


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest matrix with equal singular values, and those of ``matrix [m, n]``.

    Returns:
        ``U V^T [m, n]`` of the singular value decomposition, without the directions of vanishing
        singular values, and the other singular values, float32.
    """
    rows, columns = matrix.shape
    if rows > columns:
        nearest, values = polar(matrix.T)
        return nearest.T, values
    exact = matrix.to(torch.float64)
    squares, vectors = torch.linalg.eigh(exact @ exact.T)
    values = squares.clamp(min=0).sqrt()
    present = values > _NULL * values[-1]
    values, vectors = values[present], vectors[:, present]
    nearest = (vectors / values) @ (vectors.T @ exact)
    return nearest.float(), values.float()


def shared_basis(matrices: Tensor) -> Tensor:
    """Return the left singular vectors of ``matrices [T, m, n]`` side by side, ``[m, T n]``.

    Returns:
        ``[m, r]``, float32, by descending singular value, without those that vanish.
    """
    gram = matrices.new_zeros(matrices.shape[1], matrices.shape[1], dtype=torch.float64)
    for matrix in matrices.to(torch.float64):
        gram.addmm_(matrix, matrix.T)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.clamp(min=0).sqrt()
    basis: Tensor = vectors[:, values > _NULL * values[-1]].flip(1).float()
    return basis


def smoothed(values: Tensor, how: Literal["none", "linear", "average"], ratio: float) -> Tensor:
    """Redistribute singular values ``[k]``, descending, without changing their sum.

    Args:
        values: those that vanish stay zero.
        how: ``none`` leaves them, ``average`` makes them equal, ``linear`` lets them fall linearly.
        ratio: of the largest to the smallest after ``linear``, unless it is smaller before.
    """
    present = values > _NULL * values[0]
    count = int(present.sum())
    if how == "none" or not count:
        return values
    first = min(ratio, float(values[0] / values[count - 1])) if how == "linear" else 1.0
    shares = torch.linspace(first, 1.0, count, dtype=values.dtype, device=values.device)
    result = torch.zeros_like(values)
    result[:count] = values.sum() * shares / shares.sum()
    return result
