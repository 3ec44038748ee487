"""Weights of the tasks, for methods that take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from epmq_deploy.options import numbers_from_text, texts_read_by
from epmq_deploy.options.merging import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor


class WeightedOptions(MergeOptions):
    """Options of methods with a weight for each expert."""

    weights: Annotated[dict[str, float], texts_read_by(numbers_from_text)] = Field(
        {}, description="factor on each expert's task vector, for all tasks (cars=1,sun=0.5)"
    )


def weight_problems(options: WeightedOptions, tasks: Sequence[str]) -> list[str]:
    """Return one sentence for each mismatch between the given weights and the tasks."""
    if not options.weights:
        return []
    unknown = [task for task in options.weights if task not in tasks]
    missing = [task for task in tasks if task not in options.weights]
    problems = []
    if unknown:
        problems.append(f"merge.weights names {', '.join(unknown)}; tasks are {', '.join(tasks)}")
    if missing:
        problems.append(f"merge.weights lacks {', '.join(missing)}; give a weight for every task")
    return problems


def weight_column(options: WeightedOptions, tasks: Sequence[str], like: Tensor) -> Tensor:
    """Return weights ``[T, 1, ...]`` that broadcast over ``like [T, *]``; default: 1."""
    values = [options.weights.get(task, 1.0) for task in tasks]
    return like.new_tensor(values).reshape(-1, *([1] * (like.dim() - 1)))
