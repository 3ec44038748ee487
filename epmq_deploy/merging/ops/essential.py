"""Task vectors in the directions in which they change a layer's outputs (arXiv 2602.20208)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.merging.ops.spectral import polar

# The authors' exponent of how much more the leading directions count.
_EMPHASIS = 0.15
# Variances below this share of the largest are rounding errors of the float32 Gram matrix.
_NULL = 1e-6


@dataclass(frozen=True)
class EssentialFactors:
    """A task vector ``[m, n]`` in its leading essential directions, each weighted on both sides.

    Attributes:
        left: the directions, ``[m, k]``.
        right: the task vector's coordinates in them, ``[k, n]``.
        norm: of the whole task vector.
    """

    left: Tensor
    right: Tensor
    norm: float


def essential_factors(vector: Tensor, gram: Tensor, rank: int) -> EssentialFactors:
    """Decompose a task vector by the principal components of what it adds to the outputs.

    Args:
        vector: ``[m, n]``, float32.
        gram: of the layer's inputs, ``[n, n]``; a factor on it does not matter.
        rank: how many directions to keep; those without any effect are zero.
    """
    exact = vector.to(torch.float64)
    variances, directions = torch.linalg.eigh(exact @ gram.to(torch.float64) @ exact.T)
    variances = variances.flip(0)[:rank]
    directions = directions.flip(1)[:, :rank]
    variances = torch.where(variances > _NULL * variances[0], variances, 0.0)
    weights = (variances > 0) * polarized(polarized(variances, _EMPHASIS), 1.0)
    return EssentialFactors(
        left=(directions * weights).float(),
        right=(weights[:, None] * (directions.T @ exact)).float(),
        norm=float(torch.linalg.vector_norm(exact)),
    )


def merge_essential(factors: Sequence[EssentialFactors], polarization: float) -> Tensor:
    """Merge the tasks' factors of one layer into one task vector ``[m, n]``.

    Larger tasks and larger columns are enlarged, smaller ones reduced, by their norm relative to
    the mean norm to the power of ``polarization``. Then both sides of all tasks together are
    replaced by the nearest matrices with equal singular values, as large as theirs on average.
    """
    left = torch.cat([task.left for task in factors], dim=1)
    norms = left.new_tensor([task.norm for task in factors])
    right = torch.cat(
        [
            size * task.right
            for size, task in zip(polarized(norms, polarization), factors, strict=True)
        ]
    )
    right = right * polarized(torch.linalg.vector_norm(right, dim=0), polarization)
    return _flat(left) @ _flat(right)


def polarized(sizes: Tensor, power: float) -> Tensor:
    """Return ``(sizes / mean size)^power``, ``[n]``; ones where all sizes are zero."""
    mean = sizes.mean()
    return (sizes / mean).pow(power) if float(mean) > 0 else torch.ones_like(sizes)


def _flat(matrix: Tensor) -> Tensor:
    nearest, values = polar(matrix)
    return nearest * (values.sum() / min(matrix.shape))
