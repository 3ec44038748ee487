"""Model Breadcrumbs (arXiv 2312.06795) in the place of the trimming of TIES (arXiv 2306.01708)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from epmq_deploy.merging.method import MergeMethod, ScaledOptions
from epmq_deploy.merging.signs import Combine, disjoint_merge
from epmq_deploy.merging.sparsify import drop_extremes


class BreadcrumbsTiesOptions(ScaledOptions):
    """Model Breadcrumbs before electing signs."""

    method: Literal["breadcrumbs_ties"] = "breadcrumbs_ties"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    beta: float = Field(
        0.85, ge=0, lt=1, description="share of each tensor's entries dropped as negligible"
    )
    gamma: float = Field(
        0.993, gt=0, le=1, description="share of entries below which an entry is no outlier"
    )
    combine: Combine = Field(
        "sum", description="sum of the values that agree in sign, or their mean"
    )


def breadcrumbs_ties(base: Tensor, task_vectors: Tensor, options: BreadcrumbsTiesOptions) -> Tensor:
    """``base [*] + scaling *`` disjoint merge of ``task_vectors [T, *]`` less their extremes.

    The positive sign is elected where the kept values cancel.
    """
    kept = drop_extremes(task_vectors, options.beta, options.gamma)
    return base + options.scaling * disjoint_merge(kept, options.combine)


METHOD = MergeMethod(
    options=BreadcrumbsTiesOptions,
    summary="drop extremes as Breadcrumbs does, then elect signs and merge as TIES does",
    source="Model Breadcrumbs, arXiv 2312.06795, with TIES, arXiv 2306.01708",
    merge=lambda base, task_vectors, options, context: breadcrumbs_ties(
        base, task_vectors, options
    ),
)
