"""TIES-Merging (Yadav et al., arXiv 2306.01708): trim, elect sign, disjoint merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.lazy import numpy as np
from epmq_deploy.lazy import torch
from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, FromTaskVectors, MergeMethod, TaskVectors, pieces
from epmq_deploy.options.merging import Combine, ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor


class TrimOptions(ScaledOptions):
    """Options of methods that trim task vectors and elect signs."""

    density: float = Field(0.2, gt=0, le=1, description="share of each task vector that is kept")
    combine: Combine = Field(
        "mean", description="mean of the values that agree in sign, or their sum"
    )


class TiesOptions(TrimOptions):
    """TIES."""

    method: Literal["ties"] = "ties"
    scaling: float = Field(0.3, description="factor on the merged task vector")
    combine: Combine = Field(
        "sum",
        description="sum of the values that agree in sign (scaling about 0.3, the CLIP "
        "benchmarks), or their mean (scaling about 1, the paper)",
    )


@dataclass(frozen=True)
class TiesStatistics:
    """Statistics of all tensors together.

    Attributes:
        thresholds: float32 ``[T]`` by density: magnitudes at or above them are kept.
        majority_sign: sign elected where the kept values of a parameter cancel.
    """

    thresholds: Mapping[float, Tensor]
    majority_sign: float


def trim(task_vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Zero entries of ``task_vectors [T, *]`` below their task's threshold ``[T]``."""
    kept = torch.empty_like(task_vectors)
    for vector, threshold, result in zip(task_vectors, thresholds.tolist(), kept, strict=True):
        ops.sparsify.keep_from(vector, threshold, out=result)
    return kept


def ties(
    base: Tensor, task_vectors: Tensor, options: TiesOptions, context: Context[TiesStatistics]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[n]``.
        task_vectors: ``[T, n]``.
        options: as they hold for the tensor.
        context: with global thresholds and majority sign.

    Returns:
        ``base + scaling *`` disjoint sum or mean of the kept values whose sign is the elected one:
        that of their sum; where it is zero, the majority sign over all parameters, as in the
        authors' code.
    """
    return base + options.scaling * agreeing(task_vectors, options, context.statistics)


def agreeing(task_vectors: Tensor, options: TrimOptions, statistics: TiesStatistics) -> Tensor:
    """Merge the large entries of ``task_vectors [T, *]`` that agree in sign into one ``[*]``."""
    kept = trim(task_vectors, statistics.thresholds[options.density])
    return ops.signs.disjoint_merge(kept, options.combine, statistics.majority_sign)


def global_statistics(vectors: TaskVectors, options: TrimOptions) -> TiesStatistics:
    """Compute thresholds over all tensors that share a density, and the majority sign, in one pass.

    One task vector and the sum of the kept values of those before it are in memory.
    """
    by_density: dict[float, list[str]] = {}
    for name in vectors.names:
        by_density.setdefault(options.for_tensor(name).density, []).append(name)
    thresholds, votes = {}, 0.0
    for density, names in by_density.items():
        thresholds[density], total = _thresholds_and_sum(vectors, names, density)
        # In chunks: float32 cannot count exactly past 2**24.
        votes += sum(float(piece.sign().sum()) for piece in pieces(total[None]))
    return TiesStatistics(thresholds, 1.0 if votes >= 0 else -1.0)


def _thresholds_and_sum(
    vectors: TaskVectors, names: list[str], density: float
) -> tuple[Tensor, Tensor]:
    """Return the smallest magnitudes kept ``[T]``, and the sum of the kept values ``[n]``."""
    count = sum(vectors.size(name) for name in names)
    dropped = count - int(count * density)
    vector, total, thresholds = torch.empty(count), torch.zeros(count), []
    for index in range(len(vectors.tasks)):
        ops.selection.fill_with_task(vector, vectors, index, names)
        smallest = (
            ops.selection.kth_smallest(vector.numpy(), dropped - 1, key=np.abs) if dropped else 0.0
        )
        total += ops.sparsify.keep_from(vector, smallest, out=vector)
        thresholds.append(smallest)
    return torch.tensor(thresholds), total


METHOD = MergeMethod(
    options=TiesOptions,
    summary="keep each task vector's largest entries, elect signs, merge what agrees",
    source="TIES-Merging, arXiv 2306.01708",
    merge=ties,
    statistics=FromTaskVectors[TiesOptions, TiesStatistics](global_statistics),
    elementwise=True,
)
