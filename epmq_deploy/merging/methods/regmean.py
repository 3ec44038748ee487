"""RegMean (Jin et al., arXiv 2212.09849): linear layers merged by least squares.

The factor on off-diagonal elements is FusionBench's for CLIP (``clip_regmean.yaml``); the paper
takes 0.9 for most language models.
"""

from functools import partial
from typing import Literal

from pydantic import Field

from epmq_deploy.merging.base import MergeMethod
from epmq_deploy.merging.regression import RegressionOptions, merge_linear_layers, regressed_or_mean


class RegMeanOptions(RegressionOptions):
    """RegMean; other tensors than linear layers' weights are averaged."""

    method: Literal["regmean"] = "regmean"
    off_diagonal: float = Field(
        0.6, ge=0, le=1, description="factor on the off-diagonal elements of the Gram matrices"
    )


METHOD = MergeMethod(
    options=RegMeanOptions,
    summary="linear layers closest to all experts' outputs on their own inputs (needs data)",
    source="RegMean, arXiv 2212.09849",
    merge=lambda base, task_vectors, options, context: regressed_or_mean(
        base, task_vectors, context
    ),
    calibrate=partial(merge_linear_layers, sequential=False),
)
