"""Model Breadcrumbs (arXiv 2312.06795) instead of the trimming of TIES (arXiv 2306.01708).

The defaults are ours: what is dropped is as in ``breadcrumbs``, the scaling is that of ``ties`` for
sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import CombineOptions, ExtremesOptions

if TYPE_CHECKING:
    from torch import Tensor


class BreadcrumbsTiesOptions(ExtremesOptions, CombineOptions):
    """Model Breadcrumbs before electing signs."""

    method: Literal["breadcrumbs_ties"] = "breadcrumbs_ties"
    scaling: float = Field(0.3, description="factor on the merged task vector")


def breadcrumbs_ties(
    base: Tensor, task_vectors: Tensor, options: BreadcrumbsTiesOptions, context: Context[None]
) -> Tensor:
    """Drop the extremes of ``task_vectors [T, *]``, and add their disjoint merge to ``base [*]``.

    The positive sign is elected where the kept values cancel.
    """
    kept = ops.sparsify.drop_extremes(task_vectors, options.beta, options.gamma)
    return base + options.scaling * ops.signs.disjoint_merge(kept, options.combine)


METHOD = MergeMethod(
    options=BreadcrumbsTiesOptions,
    summary="drop extremes as Breadcrumbs does, then elect signs and merge as TIES does",
    source="Model Breadcrumbs, arXiv 2312.06795, with TIES, arXiv 2306.01708",
    merge=breadcrumbs_ties,
)
