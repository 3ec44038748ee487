"""DELLA (Deep et al., arXiv 2406.11617): drop at random by magnitude, elect signs, merge.

Defaults are those of the example in the authors' repository (language models: drop rate 0.3, window
0.14, lambda 1.1, mean of the values of the elected sign); they give none for CLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import Combine, RandomDropOptions

if TYPE_CHECKING:
    from torch import Tensor


class DellaOptions(RandomDropOptions):
    """DELLA."""

    method: Literal["della"] = "della"
    scaling: float = Field(1.1, description="factor on the merged task vector")
    density: float = Field(
        0.7, gt=0, le=1, description="share of each task vector that is kept, on average"
    )
    epsilon: float = Field(
        0.14,
        ge=0,
        le=1,
        description="how much likelier a row's largest entry is kept than its smallest",
    )
    elect: bool = Field(True, description="merge only the values of the elected sign")
    combine: Combine = Field("mean", description="mean of the kept values, or their sum")

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        half = self.epsilon / 2
        if self.density - half <= 0 or self.density + half > 1:
            raise ValueError(
                f"density {self.density:g} plus or minus half of epsilon {self.epsilon:g} must be "
                "probabilities above 0 and at most 1"
            )
        return self


def della(
    base: Tensor, task_vectors: Tensor, options: DellaOptions, context: Context[None]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        context: the tensor's name and the tasks' decide what is dropped, with the seed.

    Returns:
        ``base + scaling *`` merged; kept values are divided by their keep probability, which rises
        by ``epsilon`` from the smallest magnitude of a row (what feeds one output; a whole vector)
        to its largest. The positive sign is elected where values cancel.
    """
    kept = ops.sparsify.drop_at_random(
        task_vectors,
        lambda vector: ops.sparsify.keep_by_rank(vector, options.density, options.epsilon),
        seed=options.seed,
        name=context.name,
        tasks=context.tasks,
    )
    if options.elect:
        merged = ops.signs.disjoint_merge(kept, options.combine)
    else:
        merged = kept.sum(dim=0)
        if options.combine == "mean":
            merged = merged / (kept != 0).sum(dim=0).clamp(min=1)
    return base + options.scaling * merged


METHOD = MergeMethod(
    options=DellaOptions,
    summary="drop entries at random, small ones more often, rescale, elect signs, merge",
    source="DELLA-Merging, arXiv 2406.11617",
    merge=della,
)
