"""Model Breadcrumbs (Davari and Belilovsky, arXiv 2312.06795): drop outliers and the negligible.

The authors tune all three options; their search for CLIP starts at 85%, 99.4% and a scaling of 0.2
(``find_best_hyperparam.py``). Their code masks each row of a tensor by itself, their paper each
tensor, as here.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from epmq_deploy.merging.method import MergeMethod, ScaledOptions
from epmq_deploy.merging.sparsify import drop_extremes


class BreadcrumbsOptions(ScaledOptions):
    """Model Breadcrumbs."""

    method: Literal["breadcrumbs"] = "breadcrumbs"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    beta: float = Field(
        0.85, ge=0, lt=1, description="share of each tensor's entries dropped as negligible"
    )
    gamma: float = Field(
        0.993, gt=0, le=1, description="share of entries below which an entry is no outlier"
    )


def breadcrumbs(base: Tensor, task_vectors: Tensor, options: BreadcrumbsOptions) -> Tensor:
    """``base [*] + scaling * sum_t`` of ``task_vectors [T, *]`` less their extremes.

    Of each tensor of each task vector the smallest ``beta`` and the largest ``1 - gamma`` of the
    entries, by magnitude, are dropped.
    """
    kept = drop_extremes(task_vectors, options.beta, options.gamma)
    return base + options.scaling * kept.sum(dim=0)


METHOD = MergeMethod(
    options=BreadcrumbsOptions,
    summary="drop each tensor's smallest and largest entries, sum the rest",
    source="Model Breadcrumbs, arXiv 2312.06795",
    merge=lambda base, task_vectors, options, context: breadcrumbs(base, task_vectors, options),
)
