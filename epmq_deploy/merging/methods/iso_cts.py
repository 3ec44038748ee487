"""Iso-CTS (Marczak et al., arXiv 2502.04959): common and task-specific subspaces, isotropic.

The common share is the authors' (``config/method/iso_cts.yaml``); they choose the scaling on
validation data, and FusionBench's examples for eight tasks take 1.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.lazy import torch
from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class IsoCtsOptions(ScaledOptions):
    """Iso-CTS; tensors other than matrices are averaged."""

    method: Literal["iso_cts"] = "iso_cts"
    scaling: float = Field(
        1.5,
        description="factor on the merged task vector; the more tasks, the smaller it should be",
    )
    common: float = Field(
        0.8, ge=0, le=1, description="share of the directions that are common to all tasks"
    )


def subspaces(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """Split ``rank`` directions: how many are common to all tasks, and how many each task has."""
    each = round((rank - int(rank * common)) / tasks)
    each = min(each, rank // tasks)
    return rank - each * tasks, each


def iso_cts(
    base: Tensor, task_vectors: Tensor, options: IsoCtsOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: not used.

    Returns:
        For a matrix: the leading singular directions of the summed task vectors, then of each task
        vector the leading ones outside of them; both sides made orthonormal, all with the mean of
        the singular values. Any other tensor gets the mean of the task vectors.
    """
    if base.dim() != 2:
        return base + options.scaling * task_vectors.mean(dim=0)
    shared, each = subspaces(min(base.shape), len(task_vectors), options.common)
    triplets = [_leading(task_vectors.sum(dim=0), shared)]
    common = triplets[0][0]
    if each:
        triplets += [
            ops.spectral.top_triplets(matrix - common @ (common.T @ matrix), each)
            for matrix in task_vectors
        ]
    lefts, spectra, rights = zip(*triplets, strict=True)
    left, _ = ops.spectral.polar(torch.cat(lefts, dim=1))
    right, _ = ops.spectral.polar(torch.cat(rights, dim=0))
    values = torch.cat(spectra)
    return base + options.scaling * values.mean() * left @ right


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if rank:
        return ops.spectral.top_triplets(matrix, rank)
    rows, columns = matrix.shape
    return matrix.new_empty(rows, 0), matrix.new_empty(0), matrix.new_empty(0, columns)


METHOD = MergeMethod(
    options=IsoCtsOptions,
    summary="Iso-C that keeps some directions for single tasks (matrices; the rest is averaged)",
    source="Isotropic merging, arXiv 2502.04959",
    merge=iso_cts,
)
