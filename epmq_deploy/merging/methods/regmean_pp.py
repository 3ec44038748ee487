"""RegMean++ (arXiv 2508.03121): RegMean on what the merged model's preceding blocks give.

As in the authors' code, an expert's block runs on the merged model's hidden states, and the Gram
matrices are those of its layers' inputs. The factor is theirs for CLIP.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from epmq_deploy.merging.base import FromData, MergeMethod
from epmq_deploy.merging.methods.regmean import collect, merge
from epmq_deploy.options.merging import RegressionOptions


class RegMeanPlusPlusOptions(RegressionOptions):
    """RegMean++; other tensors than linear layers' weights are averaged."""

    method: Literal["regmean_pp"] = "regmean_pp"
    off_diagonal: float = Field(
        0.95, ge=0, le=1, description="factor on the off-diagonal elements of the Gram matrices"
    )


METHOD = MergeMethod(
    options=RegMeanPlusPlusOptions,
    summary="RegMean with inputs from the merged model's preceding blocks (needs data)",
    source="RegMean++, arXiv 2508.03121",
    merge=merge,
    statistics=FromData(partial(collect, sequential=True)),
)
