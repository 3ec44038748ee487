"""Average of the experts, plain or weighted (model soups, Wortsman et al., arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.merging.task_weights import WeightedOptions, weight_column, weight_problems

if TYPE_CHECKING:
    from torch import Tensor


class AverageOptions(WeightedOptions):
    """Average; weights are relative, their sum does not matter."""

    method: Literal["average"] = "average"


def average(
    base: Tensor, task_vectors: Tensor, options: AverageOptions, context: Context[None]
) -> Tensor:
    """Add the weighted mean of ``task_vectors [T, n]`` to ``base [n]``."""
    weights = weight_column(options, context.tasks, task_vectors)
    return base + (weights * task_vectors).sum(dim=0) / weights.sum()


def check(options: AverageOptions, tasks: Sequence[str]) -> list[str]:
    """Check that weights fit the tasks and have a positive sum."""
    problems = weight_problems(options, tasks)
    if options.weights and not problems and sum(options.weights.values()) <= 0:
        problems.append("merge.weights must have a positive sum, because average divides by it")
    return problems


METHOD = MergeMethod(
    options=AverageOptions,
    summary="mean of the experts' weights, plain or weighted",
    source="model soups, arXiv 2203.05482",
    merge=average,
    elementwise=True,
    check=check,
)
