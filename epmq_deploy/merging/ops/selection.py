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
    """Order statistics of one task vector's magnitudes, which are in memory for that time.

    Args:
        vectors: all task vectors.
        index: the expert.
        names: the tensors that count.
        ranks: places in ascending order, from 0.
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
    """The value ``[n]`` at a place in ascending order, from 0; several times faster than sorting.

    A sample tells between which two values it lies; what is between them is gathered and sorted.
    That it is there is counted, so the result is exact, however the sample turned out.

    Args:
        values: left as they are.
        rank: the place.
        key: what is ordered instead of each value, and returned; as that of ``sorted``.
    """
    sample = np.sort(key(values[:: max(1, len(values) // _SAMPLE)]))
    middle, margin = rank / len(values) * len(sample), 4 * math.sqrt(len(sample))
    first, last = int(middle - margin), int(middle + margin) + 1
    low = sample[first] if first >= 0 else -np.inf
    high = sample[last] if last < len(sample) else np.inf
    place, between = rank, []
    for start in range(0, len(values), _BLOCK):
        block = key(values[start : start + _BLOCK])
        chosen = block > low
        place -= len(block) - int(np.count_nonzero(chosen))
        chosen &= block < high
        between.append(block[chosen])
    gathered = np.concatenate(between)
    if 0 <= place < len(gathered):
        return float(np.partition(gathered, place)[place])
    # Equal values are counted, not gathered: of parameters that never moved there are many.
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
    """One order statistic of each row of a matrix that is only seen in pieces, twice.

    Floats are ordered as their bits are, after a change of sign: the first pass counts by the upper
    16 bits, the second, among those of the bin that holds the rank, by the lower 16.

    Args:
        stream: yields pieces ``[T, *]``, float32; called once per pass.
        rank: place in ascending order, from 0.

    Returns:
        float32 ``[T]``, exact.
    """
    upper_counts: defaultdict[int, Tensor] = defaultdict(_no_counts)
    for row, upper, _ in _halves(stream()):
        upper_counts[row] += torch.bincount(upper, minlength=_BINS)
    places = {row: _bin_with(counts, rank) for row, counts in upper_counts.items()}
    lower_counts: defaultdict[int, Tensor] = defaultdict(_no_counts)
    for row, upper, lower in _halves(stream()):
        chosen = lower[upper == places[row][0]]
        lower_counts[row] += torch.bincount(chosen, minlength=_BINS)
    keys = [
        (upper << 16) + _bin_with(lower_counts[row], rest)[0] - 2**31
        for row, (upper, rest) in sorted(places.items())
    ]
    return _floats(torch.tensor(keys))


def _halves(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Row by row, upper and lower 16 bits ``[n]`` int64 of keys that order as the floats do."""
    for piece in pieces:
        for row, values in enumerate(piece.reshape(len(piece), -1).cpu()):
            bits = values.contiguous().view(torch.int32).to(torch.int64)
            keys = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) + 2**31
            yield row, keys >> 16, keys & 0xFFFF


def _no_counts() -> Tensor:
    return torch.zeros(_BINS, dtype=torch.int64)


def _bin_with(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds a rank, and the rank within that bin."""
    totals = counts.cumsum(dim=0)
    found = int((totals <= rank).sum())
    return found, rank - int(totals[found] - counts[found])


def _floats(keys: Tensor) -> Tensor:
    """The float32 values that signed keys ``[n]`` stand for."""
    bits = torch.where(keys >= 0, keys, keys ^ 0x7FFFFFFF)
    return bits.to(torch.int32).view(torch.float32)
