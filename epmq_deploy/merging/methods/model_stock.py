"""Model Stock (Jang et al., arXiv 2403.19522): from base to average, as far as angles suggest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.options.merging import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor


class ModelStockOptions(MergeOptions):
    """Model Stock, which has no options."""

    method: Literal["model_stock"] = "model_stock"


def interpolation_ratio(task_vectors: Tensor) -> float:
    """Compute ``N cos / (1 + (N - 1) cos)`` of task vectors ``[N, *]``, N at least 2.

    ``cos`` is the mean cosine over all pairs; one with a zero vector counts as 0. A negative one,
    for which the source has no reading, counts as 0 as well: the experts have nothing in common.
    """
    count, present = len(task_vectors), 0
    total = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    for vector in task_vectors:
        exact = vector.to(torch.float64)
        length = torch.linalg.vector_norm(exact)
        if length > 0:
            total += exact / length
            present += 1
    # The square of a sum of unit vectors is their number plus all pairs' cosines.
    pairs = float(total.square().sum()) - present
    cosine = max(pairs / (count * (count - 1)), 0.0)
    return count * cosine / (1 + (count - 1) * cosine)


def model_stock(
    base: Tensor, task_vectors: Tensor, options: ModelStockOptions, context: Context[None]
) -> Tensor:
    """Add the mean of ``task_vectors [N, *]`` to ``base [*]``, times the tensor's ratio."""
    return base + interpolation_ratio(task_vectors) * task_vectors.mean(dim=0)


def check(options: ModelStockOptions, tasks: Sequence[str]) -> list[str]:
    """Check that there are two experts, as angles need."""
    if len(tasks) >= 2:
        return []
    return ["model_stock compares experts with each other; it needs at least two"]


METHOD = MergeMethod(
    options=ModelStockOptions,
    summary="move from base to average, tensor by tensor, as far as the experts agree in direction",
    source="Model Stock, arXiv 2403.19522",
    merge=model_stock,
    check=check,
)
