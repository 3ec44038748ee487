"""TIES-Merging (Yadav et al., arXiv 2306.01708): trim, elect sign, disjoint merge."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from epmq_deploy.merging.method import MergeMethod, MergeOptions, TaskVectors


class TiesOptions(MergeOptions):
    """TIES."""

    method: Literal["ties"] = "ties"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    density: float = Field(
        0.2, gt=0, le=1, description="share of each task vector kept, by magnitude, globally"
    )
    combine: Literal["sum", "mean"] = Field(
        "sum",
        description="disjoint sum (scaling about 0.3, the CLIP benchmarks) or disjoint mean "
        "(scaling about 1, the paper)",
    )


@dataclass(frozen=True)
class TiesStatistics:
    """What TIES must know globally.

    Attributes:
        thresholds: float32 ``[T]``; magnitudes at or above it are kept.
        majority_sign: sign a parameter takes where the elected sign is zero.
    """

    thresholds: Tensor
    majority_sign: float


def trim(task_vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Zero entries of ``task_vectors [T, *]`` below their task's threshold ``[T]``."""
    bound = thresholds.reshape(-1, *([1] * (task_vectors.dim() - 1)))
    return torch.where(task_vectors.abs() >= bound, task_vectors, 0.0)


def ties(
    base: Tensor,
    task_vectors: Tensor,
    statistics: TiesStatistics,
    *,
    scaling: float,
    combine: Literal["sum", "mean"],
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[*]``.
        task_vectors: ``[T, *]``.
        statistics: global thresholds and majority sign.
        scaling: factor on the merged task vector.
        combine: disjoint ``mean`` (the paper) or ``sum``.

    Returns:
        ``base + scaling * combine`` of the kept values whose sign is the elected one (the sign of
        the summed kept values; where that is zero, the majority sign over all parameters, as in
        the authors' code).
    """
    kept = trim(task_vectors, statistics.thresholds)
    sign = kept.sum(dim=0).sign()
    sign = torch.where(sign == 0, torch.full_like(sign, statistics.majority_sign), sign)
    agreeing = torch.where(kept.sign() == sign, kept, 0.0)
    merged = agreeing.sum(dim=0)
    if combine == "mean":
        merged = merged / (agreeing != 0).sum(dim=0).clamp(min=1)
    return base + scaling * merged


def magnitude_threshold(magnitudes: Tensor, density: float) -> float:
    """Smallest magnitude kept when the largest ``density`` share of ``[n]`` values is kept."""
    dropped = magnitudes.numel() - int(magnitudes.numel() * density)
    if dropped == 0:
        return 0.0
    return float(magnitudes.kthvalue(dropped).values)


def global_statistics(vectors: TaskVectors, options: TiesOptions) -> TiesStatistics:
    """Thresholds and majority sign; holds the magnitudes of one task at a time."""
    thresholds = []
    for task in range(vectors.tasks):
        magnitudes = torch.cat([tensor.abs().flatten() for tensor in vectors.of_task(task)])
        thresholds.append(magnitude_threshold(magnitudes, options.density))
    bounds = torch.tensor(thresholds, device=magnitudes.device)
    total = sum(float(trim(stack, bounds).sum(dim=0).sign().sum()) for stack in vectors.stacked())
    return TiesStatistics(bounds, 1.0 if total >= 0 else -1.0)


METHOD = MergeMethod(
    options=TiesOptions,
    summary="trim to the largest entries, elect signs, merge those that agree (arXiv 2306.01708)",
    merge=lambda base, task_vectors, options, statistics: ties(
        base, task_vectors, statistics, scaling=options.scaling, combine=options.combine
    ),
    statistics=global_statistics,
)
