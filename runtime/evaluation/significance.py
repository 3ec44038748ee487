"""Intervals and tests, of counts and of resampled values.

scipy and statsmodels are imported where they are needed: an application that only runs a model
imports this module too.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 20_000
# Of two graphs equally fast, one is faster in all of three runs than the other in any of its three
# one time in ten.
_FEWEST = 4

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval, in percent or in points."""

    low: float
    high: float


def wilson(hits: int, count: int) -> Interval:
    """Return the score interval of an accuracy, in percent (Wilson, JASA 22, 1927).

    Args:
        hits: correct predictions.
        count: all predictions, at least 1.
    """
    with warnings.catch_warnings():
        # Importing statsmodels adds warning filters for the whole process.
        from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, count, alpha=1 - CONFIDENCE, method="wilson")
    # Exactly 0 and 100 where no prediction, or every one, was correct.
    return Interval(0.0 if hits == 0 else 100 * low, 100.0 if hits == count else 100 * high)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value that two classifiers are equally accurate, exact.

    Under that hypothesis each sample that only one of them predicts correctly is a fair coin
    (McNemar, Psychometrika 12, 1947).

    Args:
        gained: samples that only the first predicts correctly.
        lost: samples that only the second does.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for looking at all of them (Holm, Scand. J. Statist. 6, 1979)."""
    with warnings.catch_warnings():
        from statsmodels.stats.multitest import multipletests

    return (
        [float(value) for value in multipletests(p_values, method="holm")[1]]
        if len(p_values)
        else []
    )


def median_interval(values: Sequence[float]) -> Interval | None:
    """Return the 95% interval of a median, whatever the distribution of the values.

    It lies between two of the values, so that the sign test rejects what is outside (Conover,
    Practical Nonparametric Statistics, 1999, section 3.2). Fewer than six values cannot give 95%;
    their whole range is returned, and None for fewer than four, where even that means little.
    """
    from scipy.stats import quantile_test

    if len(values) < _FEWEST:
        return None
    interval = quantile_test(values, q=0, p=0.5).confidence_interval(CONFIDENCE)
    if np.isnan(interval.low) or np.isnan(interval.high):
        return Interval(float(min(values)), float(max(values)))
    return Interval(float(interval.low), float(interval.high))


def bootstrap_p_value(gains: Floats) -> float:
    """Return the two-sided p-value that nothing is gained, from resampled gains.

    The share of gains on the rarer side of 0, twice (Davison & Hinkley, Bootstrap Methods and their
    Application, 1997, section 4.4 for the 1 that is added).
    """
    rarer = min(int((gains <= 0).sum()), int((gains >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(gains) + 1))


def percentiles(values: Floats) -> Interval:
    """Return the interval that holds 95% of resampled values, times 100."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(100 * values, [tail, 100 - tail])
    return Interval(float(low), float(high))
