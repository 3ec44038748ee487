"""Plain average of the experts (model soups, Wortsman et al., arXiv 2203.05482)."""

from typing import Literal

from torch import Tensor

from epmq_deploy.merging.method import MergeMethod, MergeOptions


class AverageOptions(MergeOptions):
    """Plain average."""

    method: Literal["average"] = "average"


def average(base: Tensor, task_vectors: Tensor) -> Tensor:
    """Mean of the experts: ``base [*]`` plus the mean of ``task_vectors [T, *]``."""
    return base + task_vectors.mean(dim=0)


METHOD = MergeMethod(
    options=AverageOptions,
    summary="mean of the experts' weights (model soups, arXiv 2203.05482)",
    merge=lambda base, task_vectors, options, statistics: average(base, task_vectors),
)
