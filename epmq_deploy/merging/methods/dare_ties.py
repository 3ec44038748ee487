"""DARE (arXiv 2311.03099) instead of the trimming of TIES (arXiv 2306.01708).

The density is FusionBench's (``config/method/dare/ties_merging.yaml``), which trims as well and
takes a scaling of 0.5; the default of 0.3 is ours: that of ``ties`` for sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import CombineOptions, RandomDropOptions

if TYPE_CHECKING:
    from torch import Tensor


class DareTiesOptions(RandomDropOptions, CombineOptions):
    """DARE before electing signs."""

    method: Literal["dare_ties"] = "dare_ties"
    scaling: float = Field(0.3, description="factor on the merged task vector")


def dare_ties(
    base: Tensor, task_vectors: Tensor, options: DareTiesOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: the tensor's name and the tasks' decide what is dropped, with the seed.

    Returns:
        ``base + scaling *`` disjoint sum or mean of the kept, rescaled values; the positive sign is
        elected where they cancel.
    """
    kept = ops.sparsify.drop_at_random(
        task_vectors,
        lambda vector: options.density,
        seed=options.seed,
        name=context.name,
        tasks=context.tasks,
    )
    return base + options.scaling * ops.signs.disjoint_merge(kept, options.combine)


METHOD = MergeMethod(
    options=DareTiesOptions,
    summary="drop at random as DARE does, then elect signs and merge as TIES does",
    source="DARE, arXiv 2311.03099, with TIES, arXiv 2306.01708",
    merge=dare_ties,
)
