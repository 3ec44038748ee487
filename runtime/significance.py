"""How sure accuracies and their differences are: intervals, paired tests, verdicts.

All functions take which samples were predicted correctly, or counts of them, and nothing else, so
that they serve any kind of task.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 20_000
_SEED = 0

Booleans = npt.NDArray[np.bool_]
Verdict = Literal["better", "no worse", "worse", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval, in percent or in points."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A graph against another one on the same samples.

    Attributes:
        points: accuracy gained, in points; negative where it was lost.
        interval: of the points.
        p_value: exact McNemar test, Holm-adjusted over tasks; None for the average over tasks,
            whose interval decides.
        agreement: percent of samples with the same prediction.
        verdict: ``better`` or ``worse`` where that is significant at 5%; otherwise ``no worse``
            where the interval excludes a loss beyond the margin, ``undecided`` where samples are
            too few to tell.
    """

    points: float
    interval: Interval
    p_value: float | None
    agreement: float
    verdict: Verdict


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


def average_interval(correct: Mapping[str, Booleans]) -> Interval:
    """Interval of the accuracy averaged over tasks, in percent: bootstrap, stratified by task.

    Drawing ``n`` samples with replacement makes the number of hits binomial, which is drawn here
    at once (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). Half a hit
    and half a miss are added to each task, so that a few samples all correct leave some doubt.

    Args:
        correct: bool ``[n]`` by task.
    """
    rng = np.random.default_rng(_SEED)
    rates = []
    for hits in correct.values():
        count = len(hits)
        share = (int(hits.sum()) + 0.5) / (count + 1)
        rates.append(rng.binomial(count, share, RESAMPLES) / count)
    return _percentiles(100 * np.mean(rates, axis=0))


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


def difference_interval(
    correct: Mapping[str, Booleans], reference: Mapping[str, Booleans]
) -> Interval:
    """Interval of the points gained on average over tasks: paired bootstrap, stratified by task.

    Each of the four outcomes of a pair counts half a sample more, as in Agresti & Min (Statistics
    in Medicine 24, 2005), so that a few pairs that all agree leave some doubt.

    Args:
        correct: bool ``[n]`` by task.
        reference: of the same samples.
    """
    rng = np.random.default_rng(_SEED)
    drawn = []
    for task, hits in correct.items():
        gained, lost = _discordant(hits, reference[task])
        count = len(hits)
        shares = np.array([gained + 0.5, lost + 0.5, count - gained - lost + 1]) / (count + 2)
        outcomes = rng.multinomial(count, shares, RESAMPLES)
        drawn.append((outcomes[:, 0] - outcomes[:, 1]) / count)
    return _percentiles(100 * np.mean(drawn, axis=0))


def compare(
    correct: Mapping[str, Booleans],
    reference: Mapping[str, Booleans],
    same: Mapping[str, Booleans],
    margin: float,
) -> tuple[dict[str, Difference], Difference]:
    """A graph against the reference, by task and on average over tasks.

    Args:
        correct: which samples the graph predicts correctly, bool ``[n]`` by task.
        reference: likewise.
        same: which samples both give the same prediction.
        margin: points that may be lost and still count as no worse.
    """
    pairs = {task: _discordant(hits, reference[task]) for task, hits in correct.items()}
    adjusted = holm([mcnemar(*pair) for pair in pairs.values()])
    tasks = {}
    for (task, (gained, lost)), p_value in zip(pairs.items(), adjusted, strict=True):
        points = 100 * (gained - lost) / len(correct[task])
        interval = difference_interval({task: correct[task]}, reference)
        sign = 0 if p_value >= 1 - CONFIDENCE else math.copysign(1, points)
        verdict = _verdict(sign, interval, margin)
        agreement = 100 * float(same[task].mean())
        tasks[task] = Difference(points, interval, p_value, agreement, verdict)
    interval = difference_interval(correct, reference)
    sign = float(interval.low > 0) - float(interval.high < 0)
    average = Difference(
        points=_mean(item.points for item in tasks.values()),
        interval=interval,
        p_value=None,
        agreement=_mean(item.agreement for item in tasks.values()),
        verdict=_verdict(sign, interval, margin),
    )
    return tasks, average


def _verdict(sign: float, interval: Interval, margin: float) -> Verdict:
    if sign:
        return "better" if sign > 0 else "worse"
    return "no worse" if interval.low >= -margin else "undecided"


def _discordant(first: Booleans, second: Booleans) -> tuple[int, int]:
    """Samples that only the first, and only the second, predicts correctly."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def _percentiles(values: npt.NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
