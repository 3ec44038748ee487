"""TIES-Merging (Yadav et al., arXiv 2306.01708): trim, elect sign, disjoint merge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from epmq_deploy.ahead import ahead
from epmq_deploy.merging.method import MergeMethod, ScaledOptions, TaskVectors
from epmq_deploy.merging.selection import magnitude_ranks
from epmq_deploy.merging.signs import Combine, disjoint_merge
from epmq_deploy.merging.sparsify import keep_from


class TiesOptions(ScaledOptions):
    """TIES."""

    method: Literal["ties"] = "ties"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    density: float = Field(0.2, gt=0, le=1, description="share of each task vector that is kept")
    combine: Combine = Field(
        "sum",
        description="sum of the values that agree in sign (scaling about 0.3, the CLIP "
        "benchmarks), or their mean (scaling about 1, the paper)",
    )


@dataclass(frozen=True)
class TiesStatistics:
    """What TIES must know globally.

    Attributes:
        thresholds: float32 ``[T]`` by density: magnitudes at or above them are kept.
        majority_sign: sign a parameter takes where the kept values cancel. Finding it takes another
            pass over all experts, so it is only asked for when there is such a parameter.
    """

    thresholds: Mapping[float, Tensor]
    majority_sign: Callable[[], float]


def trim(task_vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Zero entries of ``task_vectors [T, *]`` below their task's threshold ``[T]``."""
    kept = torch.empty_like(task_vectors)
    for vector, threshold, result in zip(task_vectors, thresholds.tolist(), kept, strict=True):
        keep_from(vector, threshold, out=result)
    return kept


def ties(base: Tensor, task_vectors: Tensor, options: TiesOptions, known: TiesStatistics) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        options: as they hold for the tensor.
        known: global thresholds and majority sign.

    Returns:
        ``base + scaling *`` disjoint sum or mean of the kept values whose sign is the elected one:
        that of their sum; where it is zero, the majority sign over all parameters, as in the
        authors' code.
    """
    kept = trim(task_vectors, known.thresholds[options.density])
    merged = disjoint_merge(kept, options.combine, known.majority_sign)
    return base + options.scaling * merged


def global_statistics(vectors: TaskVectors, options: TiesOptions) -> TiesStatistics:
    """Thresholds over all tensors that share a density; holds one task's magnitudes at a time."""
    densities = {name: options.for_tensor(name).density for name in vectors.names}
    thresholds = {
        density: torch.tensor(
            _thresholds(
                vectors, [name for name in vectors.names if densities[name] == density], density
            )
        )
        for density in dict.fromkeys(densities.values())
    }

    @cache
    def majority_sign() -> float:
        total = 0.0
        stacks = ahead(vectors.of_tensor, vectors.names, 1)
        for name, stack in zip(vectors.names, stacks, strict=True):
            kept = trim(stack, thresholds[densities[name]])
            total += float(kept.sum(dim=0).sign().sum())
        return 1.0 if total >= 0 else -1.0

    return TiesStatistics(thresholds, majority_sign)


def _thresholds(vectors: TaskVectors, names: list[str], density: float) -> list[float]:
    """Smallest magnitude kept of each task when the largest ``density`` share is kept."""
    count = sum(vectors.size(name) for name in names)
    dropped = count - int(count * density)
    if dropped == 0:
        return [0.0] * len(vectors.tasks)
    return [
        magnitude_ranks(vectors, index, names, [dropped - 1])[0]
        for index in range(len(vectors.tasks))
    ]


METHOD = MergeMethod(
    options=TiesOptions,
    summary="keep each task vector's largest entries, elect signs, merge what agrees",
    source="TIES-Merging, arXiv 2306.01708",
    merge=lambda base, task_vectors, options, context: ties(
        base, task_vectors, options, context.statistics
    ),
    statistics=global_statistics,
    elementwise=True,
)
