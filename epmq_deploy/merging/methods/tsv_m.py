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
        For a matrix the base plus the decorrelated task vectors; any other tensor gets their mean.
    """
    merged = decorrelated(task_vectors) if base.dim() == 2 else task_vectors.mean(dim=0)
    return base + options.scaling * merged


def decorrelated(matrices: Tensor) -> Tensor:
    """Merge task vectors ``[T, m, n]`` into one ``[m, n]``.

    Of each task the ``min(m, n) / T`` largest singular triplets (one at least) are kept; all tasks'
    left vectors together are replaced by the nearest orthonormal ones, and so are the right ones.
    Directions that tasks share exactly are not filled up with others.
    """
    rank = max(1, min(matrices.shape[1:]) // len(matrices))
    triplets = [ops.spectral.top_triplets(matrix, rank) for matrix in matrices]
    lefts, spectra, rights = zip(*triplets, strict=True)
    left, _ = ops.spectral.polar(torch.cat(lefts, dim=1))
    right, _ = ops.spectral.polar(torch.cat(rights, dim=0))
    merged: Tensor = (left * torch.cat(spectra)) @ right
    return merged


METHOD = MergeMethod(
    options=TsvmOptions,
    summary="each task's leading singular vectors, decorrelated (matrices; the rest is averaged)",
    source="TSV-Merge, arXiv 2412.00081",
    merge=tsv_m,
)
