"""Dropping parts of task vectors: at random (DARE, DELLA) or by size (Breadcrumbs)."""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from epmq_deploy.merging.ops.selection import kth_smallest


def generator_for(seed: int, *labels: str) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and the labels, not on earlier draws."""
    digest = hashlib.sha256("\0".join((str(seed), *labels)).encode()).digest()
    # Generators take 64 bits, but negative seeds are not portable.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def keep_from(values: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    """Zero ``values [*]``, float32, whose magnitude is below a float32 threshold."""
    # hardshrink drops magnitudes up to its bound, the bound included, in one pass.
    bound = float(np.nextafter(np.float32(threshold), np.float32(-1)))
    return torch.hardshrink(values, bound, out=out)


def drop_at_random(
    task_vectors: Tensor,
    keep: Callable[[Tensor], Tensor | float],
    *,
    seed: int,
    name: str,
    tasks: Sequence[str],
) -> Tensor:
    """Keep each entry with its probability, and divide the kept ones by it.

    Args:
        task_vectors: ``[T, *]``, float32.
        keep: returns the probabilities, in (0, 1], for one task vector ``[*]``.
        seed: of the choice. With the names of tensor and task it decides all draws, so neither the
            order of tensors or experts nor the device matters.
        name: of the tensor.
        tasks: names of the experts.

    Returns:
        ``[T, *]``, with the expectation of ``task_vectors``.
    """
    kept = torch.empty_like(task_vectors)
    for vector, result, task in zip(task_vectors, kept, tasks, strict=True):
        share = keep(vector)
        draws = torch.rand(vector.shape, generator=generator_for(seed, name, task))
        is_kept = draws.to(vector.device) < share
        result.copy_(vector * is_kept / share)
    return kept


def keep_by_rank(task_vector: Tensor, density: float, epsilon: float) -> Tensor:
    """Return keep probabilities that rise with the rank of an entry's magnitude in its row.

    Args:
        task_vector: ``[*]``; a row holds the weights of one output; a vector is one row.
        density: mean probability.
        epsilon: difference between the largest and the smallest probability of a row.

    Returns:
        ``[*]``: from ``density - epsilon / 2`` for the smallest magnitude of a row to
        ``density + epsilon / 2`` for the largest.
    """
    rows = task_vector.flatten(1) if task_vector.dim() > 1 else task_vector.reshape(1, -1)
    count = rows.shape[-1]
    order = rows.abs().argsort(dim=-1, stable=True)
    evenly = (
        torch.linspace(-0.5, 0.5, count, device=rows.device) if count > 1 else rows.new_zeros(1)
    )
    shares = torch.empty_like(rows).scatter_(-1, order, evenly.expand_as(rows).contiguous())
    return (density + epsilon * shares).reshape(task_vector.shape)


def drop_extremes(task_vectors: Tensor, beta: float, gamma: float) -> Tensor:
    """Zero each task vector's smallest and largest entries.

    Args:
        task_vectors: ``[T, *]``.
        beta: share of the entries dropped for being small.
        gamma: share of the entries that are not among the dropped large ones.

    Returns:
        ``[T, *]``; both shares are of this tensor's entries and rounded down.
    """
    count = task_vectors[0].numel()
    small, large = int(count * beta), count - math.ceil(count * gamma)
    kept = torch.empty_like(task_vectors)
    for vector, result in zip(task_vectors, kept, strict=True):
        sizes = vector.abs().reshape(-1).cpu().numpy()
        remaining = hardshrink(vector, kth_smallest(sizes, small - 1)) if small else vector
        if large:
            remaining = remaining - keep_from(remaining, kth_smallest(sizes, count - large))
        result.copy_(remaining)
    return kept
