"""Task Arithmetic (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging.base import MergeMethod
from epmq_deploy.merging.task_weights import WeightedOptions, weight_column, weight_problems
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmeticOptions(ScaledOptions, WeightedOptions):
    """Task Arithmetic; a task's own scaling is ``scaling`` times its weight."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: float = Field(0.3, description="factor on the merged task vector")


def task_arithmetic(
    base: Tensor, task_vectors: Tensor, scaling: float, weights: Tensor | None = None
) -> Tensor:
    """``base [*] + scaling * sum_t weights_t task_vectors_t``.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        scaling: of all tasks.
        weights: of each task, ``[T, 1, ...]``; 1 when absent.
    """
    vectors = task_vectors if weights is None else weights * task_vectors
    return base + scaling * vectors.sum(dim=0)


METHOD = MergeMethod(
    options=TaskArithmeticOptions,
    summary="base + scaling * sum of task vectors, each with a weight of its own if wanted",
    source="Task Arithmetic, arXiv 2212.04089",
    merge=lambda base, task_vectors, options, context: task_arithmetic(
        base,
        task_vectors,
        options.scaling,
        weight_column(options, context.tasks, task_vectors) if options.weights else None,
    ),
    elementwise=True,
    check=weight_problems,
)
