"""DARE (Yu et al., arXiv 2311.03099): drop entries of task vectors at random and rescale.

Density and scaling are FusionBench's for CLIP (``config/method/dare/task_arithmetic.yaml``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import RandomDropOptions

if TYPE_CHECKING:
    from torch import Tensor


class DareOptions(RandomDropOptions):
    """DARE before Task Arithmetic."""

    method: Literal["dare"] = "dare"
    scaling: float = Field(0.3, description="factor on the merged task vector")


def dare(
    base: Tensor, task_vectors: Tensor, options: DareOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: the tensor's name and the tasks' decide what is dropped, with the seed.

    Returns:
        ``base + scaling * sum_t kept_t / density``.
    """
    kept = ops.sparsify.drop_at_random(
        task_vectors,
        lambda vector: options.density,
        seed=options.seed,
        name=context.name,
        tasks=context.tasks,
    )
    return base + options.scaling * kept.sum(dim=0)


METHOD = MergeMethod(
    options=DareOptions,
    summary="drop entries of the task vectors at random, rescale the rest, sum",
    source="DARE, arXiv 2311.03099",
    merge=dare,
)
