"""Exact order statistics of task vectors too large to hold together."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epmq_deploy.merging.base import TaskVectors

_BINS = 2**16
_SAMPLE, _BLOCK = 2**16, 2**18


def magnitude_ranks(
    vectors: TaskVectors, index: int, names: Sequence[str], ranks: Sequence[int]
) -> list[float]:
    """Return order statistics of one task vector's magnitudes, which are held in memory meanwhile.

    Args:
        vectors: all task vectors.
        index: the expert.
        names: the tensors to consider.
        ranks: ranks in ascending order, from 0.
    """
    whole = torch.empty(sum(vectors.size(name) for name in names))
    fill_with_task(whole, vectors, index, names)
    return [kth_smallest(whole.numpy(), rank, key=np.abs) for rank in ranks]


def fill_with_task(whole: Tensor, vectors: TaskVectors, index: int, names: Sequence[str]) -> None:
    """Overwrite ``whole [n]``, float32, CPU, with one task vector, tensor after tensor."""
    start = 0
    for vector in vectors.of_task(index, names):
        stop = start + vector.numel()
        whole[start:stop] = vector.reshape(-1)
        start = stop


def kth_smallest(
    values: NDArray[np.float32],
    rank: int,
    key: Callable[[NDArray[np.float32]], NDArray[np.float32]] = np.asarray,
) -> float:
    """Return the value of a rank in ascending order, from 0; several times faster than sorting.

    A sample gives two values that should enclose the result; the values between them are gathered
    and partitioned. Counting tells whether the result is among them, so it is always exact.

    Args:
        values: ``[n]``; not changed.
        rank: rank of the value, from 0.
        key: maps blocks of values to what is ordered and returned, like the ``key`` of ``sorted``.
    """
    sample = np.sort(key(values[:: max(1, len(values) // _SAMPLE)]))
    middle, margin = rank / len(values) * len(sample), 4 * math.sqrt(len(sample))
    first, last = int(middle - margin), int(middle + margin) + 1
    low = sample[first] if first >= 0 else -np.inf
    high = sample[last] if last < len(sample) else np.inf
    rank_between, between = rank, []
    for start in range(0, len(values), _BLOCK):
        block = key(values[start : start + _BLOCK])
        inside = block > low
        rank_between -= len(block) - int(np.count_nonzero(inside))
        inside &= block < high
        between.append(block[inside])
    gathered = np.concatenate(between)
    if 0 <= rank_between < len(gathered):
        return float(np.partition(gathered, rank_between)[rank_between])
    # Ties are counted, not gathered, because many entries are exactly zero.
    for bound in (low, high):
        below, up_to = (
            sum(
                int(np.count_nonzero(compare(key(values[start : start + _BLOCK]), bound)))
                for start in range(0, len(values), _BLOCK)
            )
            for compare in (np.less, np.less_equal)
        )
        if below <= rank < up_to:
            return float(bound)
    return float(np.partition(key(values), rank)[rank])


def streamed_ranks(stream: Callable[[], Iterable[Tensor]], rank: int) -> Tensor:
    """Return one order statistic of each row of a matrix that is streamed in pieces, twice.

    The bits of floats, adjusted for the sign, order as the floats do: the first pass counts by the
    upper 16 bits, the second, within the bin that holds the rank, by the lower 16.

    Args:
        stream: yields pieces ``[T, *]``, float32; called once per pass.
        rank: rank in ascending order, from 0.

    Returns:
        float32 ``[T]``, exact.
    """
    upper_counts: defaultdict[int, Tensor] = defaultdict(_no_counts)
    for row, upper, _ in _halves(stream()):
        upper_counts[row] += torch.bincount(upper, minlength=_BINS)
    bins = {row: _bin_with(counts, rank) for row, counts in upper_counts.items()}
    lower_counts: defaultdict[int, Tensor] = defaultdict(_no_counts)
    for row, upper, lower in _halves(stream()):
        inside = lower[upper == bins[row][0]]
        lower_counts[row] += torch.bincount(inside, minlength=_BINS)
    keys = [
        (upper << 16) + _bin_with(lower_counts[row], rest)[0] - 2**31
        for row, (upper, rest) in sorted(bins.items())
    ]
    return _floats(torch.tensor(keys))


def _halves(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, row by row, upper and lower 16 bits ``[n]`` int64 of keys that order as the floats."""
    for piece in pieces:
        for row, values in enumerate(piece.reshape(len(piece), -1).cpu()):
            bits = values.contiguous().view(torch.int32).to(torch.int64)
            keys = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) + 2**31
            yield row, keys >> 16, keys & 0xFFFF


def _no_counts() -> Tensor:
    return torch.zeros(_BINS, dtype=torch.int64)


def _bin_with(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds a rank, and the rank within that bin."""
    totals = counts.cumsum(dim=0)
    index = int((totals <= rank).sum())
    return index, rank - int(totals[index] - counts[index])


def _floats(keys: Tensor) -> Tensor:
    """Return the float32 values of signed keys ``[n]``."""
    bits = torch.where(keys >= 0, keys, keys ^ 0x7FFFFFFF)
    return bits.to(torch.int32).view(torch.float32)
