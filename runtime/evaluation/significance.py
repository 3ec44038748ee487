"""Intervals and tests, of counts and of resampled values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 20_000

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval, in percent or in points."""

    low: float
    high: float


def wilson(hits: int, count: int) -> Interval:
    """Score interval of an accuracy, in percent (Wilson, JASA 22, 1927).

    Args:
        hits: correct predictions.
        count: all predictions, at least 1.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    rate = hits / count
    scale = 1 + z * z / count
    center = (rate + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    # Exactly 0 and 100 where no prediction, or every one, was correct.
    low = 0.0 if hits == 0 else 100 * (center - half)
    return Interval(low, 100.0 if hits == count else 100 * (center + half))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p value that two classifiers are equally accurate, exact.

    Under that hypothesis each sample only one of them predicts correctly is a fair coin
    (McNemar, Psychometrika 12, 1947).

    Args:
        gained: samples only the first predicts correctly.
        lost: samples only the second does.
    """
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    # Integers divide to the nearest float however large they are.
    p_value: float = 2 * tail / 2**count
    return min(1.0, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for looking at all of them (Holm, Scand. J. Statist. 6, 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap_p_value(gains: Floats) -> float:
    """Two-sided p value that nothing is gained, of resampled gains.

    The share of gains on the rarer side of 0, twice (Davison & Hinkley, Bootstrap Methods and their
    Application, 1997, section 4.4 for the 1 that is added).
    """
    rarer = min(int((gains <= 0).sum()), int((gains >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(gains) + 1))


def percentiles(values: Floats) -> Interval:
    """The interval that holds 95% of resampled values, in percent of them."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(100 * values, [tail, 100 - tail])
    return Interval(float(low), float(high))
