"""RegMean++ (arXiv 2508.03121): RegMean on what the merged model's preceding blocks give.

As in the authors' code, an expert's block runs on the merged model's hidden states, and the Gram
matrices are those of its layers' inputs. The factor is theirs for CLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging.base import Context, MergeMethod, TaskVectors
from epmq_deploy.options.merging import RegressionOptions

if TYPE_CHECKING:
    from torch import Tensor

    from epmq_deploy.merging.calibrated import Calibrated, CalibrationData


class RegMeanPlusPlusOptions(RegressionOptions):
    """RegMean++; other tensors than linear layers' weights are averaged."""

    method: Literal["regmean_pp"] = "regmean_pp"
    off_diagonal: float = Field(
        0.95, ge=0, le=1, description="factor on the off-diagonal elements of the Gram matrices"
    )


def collect(data: CalibrationData, vectors: TaskVectors, options: RegressionOptions) -> Calibrated:
    """Merge linear layers, each expert's preceding blocks being the merged model's."""
    from epmq_deploy.merging.regression import merge_linear_layers

    return merge_linear_layers(data, vectors, options, sequential=True)


def merge(
    base: Tensor, task_vectors: Tensor, options: RegressionOptions, context: Context
) -> Tensor:
    """Add to ``base [*]`` what was solved for, else the mean of ``task_vectors [T, *]``."""
    from epmq_deploy.merging.regression import regressed_or_mean

    return regressed_or_mean(base, task_vectors, context)


METHOD = MergeMethod(
    options=RegMeanPlusPlusOptions,
    summary="RegMean with inputs from the merged model's preceding blocks (needs data)",
    source="RegMean++, arXiv 2508.03121",
    merge=merge,
    calibrate=collect,
)
