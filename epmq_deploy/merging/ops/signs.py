"""Electing a sign per parameter and merging the values that agree (arXiv 2306.01708)."""

import torch
from torch import Tensor

from epmq_deploy.merging.base import pieces
from epmq_deploy.options.merging import Combine


def disjoint_merge(kept: Tensor, combine: Combine, undecided: float = 1.0) -> Tensor:
    """Merge, parameter by parameter, the values whose sign is the elected one.

    Args:
        kept: sparse task vectors ``[T, *]``; zeros do not take part.
        combine: sum of the agreeing values, or their mean.
        undecided: sign to take where the kept values sum to zero.

    Returns:
        ``[*]``; the elected sign is that of the sum of the kept values.
    """
    merged = kept.new_empty(kept.shape[1:])
    for part, result in zip(pieces(kept), pieces(merged[None]), strict=True):
        result[0] = _merged(part, combine, undecided)
    return merged


def _merged(kept: Tensor, combine: Combine, undecided: float) -> Tensor:
    # Two sums per parameter take a fraction of the time of comparing signs entry by entry.
    total, above, below = (part.sum(dim=0) for part in (kept, kept.clamp(min=0), kept.clamp(max=0)))
    cancelled = (total == 0) & (above > 0)
    total = torch.where(cancelled, undecided, total)
    merged = torch.where(total > 0, above, below)
    if combine == "mean":
        counts = torch.where(total > 0, (kept > 0).sum(dim=0), (kept < 0).sum(dim=0))
        merged = merged / counts.clamp(min=1)
    return merged
