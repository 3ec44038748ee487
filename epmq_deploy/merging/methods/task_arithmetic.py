"""Task Arithmetic (Ilharco et al., arXiv 2212.04089)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from epmq_deploy.merging.method import MergeMethod, MergeOptions


class TaskArithmeticOptions(MergeOptions):
    """Task Arithmetic."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    scaling: float = Field(0.3, description="factor on the summed task vectors")


def task_arithmetic(base: Tensor, task_vectors: Tensor, scaling: float) -> Tensor:
    """``base [*] + scaling * sum_t task_vectors[t]``, task_vectors ``[T, *]``."""
    return base + scaling * task_vectors.sum(dim=0)


METHOD = MergeMethod(
    options=TaskArithmeticOptions,
    summary="base + scaling * sum of task vectors (arXiv 2212.04089)",
    merge=lambda base, task_vectors, options, statistics: task_arithmetic(
        base, task_vectors, options.scaling
    ),
)
