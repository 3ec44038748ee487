"""Average of the experts, plain or weighted (model soups, Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from epmq_deploy.merging.base import MergeMethod
from epmq_deploy.merging.task_weights import WeightedOptions, weight_column, weight_problems

if TYPE_CHECKING:
    from torch import Tensor


class AverageOptions(WeightedOptions):
    """Average; weights are relative, their sum does not matter."""

    method: Literal["average"] = "average"


def average(base: Tensor, task_vectors: Tensor, weights: Tensor) -> Tensor:
    """``base [*]`` plus the weighted mean of ``task_vectors [T, *]``; weights ``[T, 1, ...]``."""
    return base + (weights * task_vectors).sum(dim=0) / weights.sum()


def check(options: AverageOptions, tasks: Sequence[str]) -> list[str]:
    """Weights must fit the tasks and have a positive sum."""
    found = weight_problems(options, tasks)
    if options.weights and not found and sum(options.weights.values()) <= 0:
        found.append("merge.weights must have a positive sum to be averaged with")
    return found


METHOD = MergeMethod(
    options=AverageOptions,
    summary="mean of the experts' weights, plain or weighted",
    source="model soups, arXiv 2203.05482",
    merge=lambda base, task_vectors, options, context: average(
        base, task_vectors, weight_column(options, context.tasks, task_vectors)
    ),
    elementwise=True,
    check=check,
)
