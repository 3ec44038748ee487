"""RegMean (Jin et al., arXiv 2212.09849): linear layers merged by least squares.

The factor on off-diagonal elements is FusionBench's for CLIP (``clip_regmean.yaml``); the paper
takes 0.9 for most language models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging.base import Context, FromData, MergeMethod, TaskVectors
from epmq_deploy.options.merging import RegressionOptions

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_deploy.merging.base import Calibrated, CalibrationData


class RegMeanOptions(RegressionOptions):
    """RegMean; other tensors than linear layers' weights are averaged."""

    method: Literal["regmean"] = "regmean"
    off_diagonal: float = Field(
        0.6, ge=0, le=1, description="factor on the off-diagonal elements of the Gram matrices"
    )


def collect(
    data: CalibrationData,
    vectors: TaskVectors,
    options: RegressionOptions,
    *,
    sequential: bool = False,
) -> Calibrated[dict[str, Tensor]]:
    """Merge linear layers on the inputs they have behind each expert's own preceding blocks.

    Args:
        data: samples and experts.
        vectors: the experts' task vectors.
        options: of the method.
        sequential: take the inputs they have behind the merged model's preceding blocks instead.
    """
    from epmq_deploy.merging.regression import merge_linear_layers

    return merge_linear_layers(data, vectors, options, sequential=sequential)


def merge(
    base: Tensor,
    task_vectors: Tensor,
    options: RegressionOptions,
    context: Context[dict[str, Tensor]],
) -> Tensor:
    """Add to ``base [*]`` what was solved for, else the mean of ``task_vectors [T, *]``."""
    from epmq_deploy.merging.regression import regressed_or_mean

    return regressed_or_mean(base, task_vectors, context)


METHOD = MergeMethod(
    options=RegMeanOptions,
    summary="linear layers closest to all experts' outputs on their own inputs (needs data)",
    source="RegMean, arXiv 2212.09849",
    merge=merge,
    statistics=FromData(collect),
)
