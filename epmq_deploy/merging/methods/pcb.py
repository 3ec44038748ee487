"""PCB-Merging (Du et al., arXiv 2410.02396): parameter competition balancing.

The ratio is the default in the authors' code (``pcb-merging.py``). There the scaling is searched
for, task by task, between 0.8 and 1.3; the default is where that search starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from epmq_deploy.checkpoints.prefetch import ahead
from epmq_deploy.lazy import torch
from epmq_deploy.merging import ops
from epmq_deploy.merging.base import Context, FromTaskVectors, MergeMethod, TaskVectors, pieces
from epmq_deploy.options.merging import ScaledOptions

if TYPE_CHECKING:
    from torch import Tensor

# Share of magnitudes that are clamped at either end, as in the authors' code.
_CLAMPED = 1e-4


class PcbOptions(ScaledOptions):
    """PCB-Merging."""

    method: Literal["pcb"] = "pcb"
    scaling: float = Field(1.0, description="factor on the merged task vector")
    ratio: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of each task vector that is kept: the entries with the highest scores",
    )

    whole_model = ScaledOptions.whole_model | {"ratio"}


@dataclass(frozen=True)
class PcbStatistics:
    """Statistics of all tensors together, float32 ``[T]`` each.

    Attributes:
        low: smallest magnitude after clamping.
        high: largest magnitude after clamping.
        threshold: score an entry must exceed to be merged.
        best: largest score.
    """

    low: Tensor
    high: Tensor
    threshold: Tensor
    best: Tensor


def scores(task_vectors: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return clamped task vectors and their scores, both ``[T, *]``.

    A score is ``exp(T norm(|tau_t|)^2)``, which says how much an entry matters in its task, times
    ``tanh(tau_t sum tau)``, which says how well it goes with the other tasks. A constant factor
    that drops out again keeps the exponential small.

    Args:
        task_vectors: ``[T, *]``.
        low: ``[T]``, smallest magnitude of each task.
        high: ``[T]``, largest magnitude of each task.
    """
    low, high = _column(low, task_vectors), _column(high, task_vectors)
    sizes = task_vectors.abs().clamp(low, high)
    share = _normalised(sizes, low, high)
    within = torch.exp(len(task_vectors) * (share.square() - 1))
    across = torch.tanh(task_vectors * task_vectors.sum(dim=0))
    return task_vectors.sign() * sizes, within * across


def pcb(
    base: Tensor, task_vectors: Tensor, options: PcbOptions, context: Context[PcbStatistics]
) -> Tensor:
    """Merge one tensor.

    Args:
        base: ``[n]``.
        task_vectors: ``[T, n]``.
        options: as they hold for the tensor.
        context: with the global statistics.

    Returns:
        ``base + scaling *`` the mean of the task vectors, weighted entry by entry with scores that
        are zero up to the threshold and one at the best.
    """
    statistics = context.statistics
    low, high, threshold, best = (
        value.to(base.device)
        for value in (statistics.low, statistics.high, statistics.threshold, statistics.best)
    )
    clamped, score = scores(task_vectors, low, high)
    bottom, top = _column(threshold, score), _column(best, score)
    weights = _normalised(score.clamp(bottom, top), bottom, top)
    merged = (weights * clamped).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-12)
    return base + options.scaling * merged


def global_statistics(vectors: TaskVectors, options: PcbOptions) -> PcbStatistics:
    """Compute order statistics in four passes; one task's magnitudes are in memory at a time."""
    count = sum(vectors.size(name) for name in vectors.names)
    ranks = (int(count * _CLAMPED), int(count * (1 - _CLAMPED) - 1))
    bounds = torch.tensor(
        [
            ops.selection.magnitude_ranks(vectors, index, vectors.names, ranks)
            for index in range(len(vectors.tasks))
        ]
    )
    low, high = bounds[:, 0], bounds[:, 1]

    def stream() -> Iterator[Tensor]:
        for stack in ahead(vectors.of_tensor, vectors.names, 1):
            for part in pieces(stack.cpu()):
                yield scores(part, low, high)[1]

    threshold = ops.selection.streamed_ranks(
        stream, min(int(count * (1 - options.ratio)), count - 1)
    )
    best = threshold
    for piece in stream():
        best = torch.maximum(best, piece.amax(dim=1))
    return PcbStatistics(low, high, threshold, best)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def _normalised(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map values to 0 at ``low`` and 1 at ``high``; 0 where the two are equal."""
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


METHOD = MergeMethod(
    options=PcbOptions,
    summary="mean weighted by how entries compete within and across tasks, weak ones dropped",
    source="PCB-Merging, arXiv 2410.02396",
    merge=pcb,
    statistics=FromTaskVectors(global_statistics),
    elementwise=True,
)
