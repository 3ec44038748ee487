"""TSV-M (Gargiulo et al., arXiv 2412.00081): merge decorrelated task singular vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.lazy import torch
from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class TsvmOptions(ScaledOptions):
    """TSV-M; tensors other than matrices are averaged."""

    method: Literal["tsv_m"] = "tsv_m"
    scaling: float = Field(1.0, description="factor on the merged task vector")


def tsv_m(
    base: Tensor, task_vectors: Tensor, options: TsvmOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: not used.

    Returns:
        For a matrix ``[m, n]``: of each task the ``min(m, n) / T`` largest singular triplets (one
        at least) are kept; all tasks' left vectors together are replaced by the nearest orthonormal
        ones, and so are the right ones; the product with the singular values is added to the
        base. Directions that tasks share exactly are not filled up with others. Any other tensor
        gets the mean of the task vectors.
    """
    if base.dim() != 2:
        return base + options.scaling * task_vectors.mean(dim=0)
    rank = max(1, min(base.shape) // len(task_vectors))
    triplets = [ops.spectral.top_triplets(matrix, rank) for matrix in task_vectors]
    lefts, spectra, rights = zip(*triplets, strict=True)
    left, _ = ops.spectral.polar(torch.cat(lefts, dim=1))
    right, _ = ops.spectral.polar(torch.cat(rights, dim=0))
    values = torch.cat(spectra)
    return base + options.scaling * (left * values) @ right


METHOD = MergeMethod(
    options=TsvmOptions,
    summary="each task's leading singular vectors, decorrelated (matrices; the rest is averaged)",
    source="TSV-Merge, arXiv 2412.00081",
    merge=tsv_m,
)
