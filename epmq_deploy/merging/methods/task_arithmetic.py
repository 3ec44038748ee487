"""Task Arithmetic (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.merging.task_weights import WeightedOptions, weight_column, weight_problems
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmeticOptions(ScaledOptions, WeightedOptions):
    """Task Arithmetic; each task is scaled by ``scaling`` times its weight."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: float = Field(0.3, description="factor on the merged task vector")


def task_arithmetic(
    base: Tensor, task_vectors: Tensor, options: TaskArithmeticOptions, context: Context[None]
) -> Tensor:
    """Compute ``base [n] + scaling * sum_t weights_t task_vectors_t``; weights are 1 by default."""
    if options.weights:
        task_vectors = weight_column(options, context.tasks, task_vectors) * task_vectors
    return base + options.scaling * task_vectors.sum(dim=0)


METHOD = MergeMethod(
    options=TaskArithmeticOptions,
    summary="base + scaling * sum of task vectors, optionally with a weight per task",
    source="Task Arithmetic, arXiv 2212.04089",
    merge=task_arithmetic,
    elementwise=True,
    check=weight_problems,
)
