"""Intervals and tests against references that enumerate or resample."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from epmq_deploy.runtime.significance import (
    Booleans,
    average_interval,
    compare,
    difference_interval,
    holm,
    mcnemar,
    wilson,
)


def booleans(hits: int, count: int) -> Booleans:
    return np.arange(count) < hits


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17, 1998, table I, method 3.
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilson_gives_the_published_intervals(
    hits: int, count: int, low: float, high: float
) -> None:
    found = wilson(hits, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-3), pytest.approx(high, abs=5e-3))
    mirrored = wilson(count - hits, count)
    assert mirrored.low == pytest.approx(100 - found.high)


def enumerated_p_value(gained: int, lost: int) -> float:
    """Share of all coin sequences at least as uneven as the one seen."""
    count = gained + lost
    seen = abs(gained - lost)
    sides = itertools.product((0, 1), repeat=count)
    return float(Fraction(sum(abs(2 * sum(side) - count) >= seen for side in sides), 2**count))


@pytest.mark.parametrize(("gained", "lost"), list(itertools.product(range(7), range(7))))
def test_mcnemar_equals_enumeration(gained: int, lost: int) -> None:
    assert mcnemar(gained, lost) == pytest.approx(enumerated_p_value(gained, lost))


def test_mcnemar_of_many_samples_does_not_overflow() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(900, 1100) < 1e-4
    assert mcnemar(0, 2000) == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_difference_interval_equals_resampling_of_pairs() -> None:
    rng = np.random.default_rng(1)
    first = {"a": rng.random(60) < 0.8, "b": rng.random(40) < 0.6}
    second = {"a": rng.random(60) < 0.7, "b": rng.random(40) < 0.6}
    means = []
    for _ in range(20_000):
        parts = []
        for task, hits in first.items():
            drawn = rng.integers(0, len(hits), len(hits))
            parts.append(hits[drawn].mean() - second[task][drawn].mean())
        means.append(100 * np.mean(parts))
    low, high = np.percentile(means, [2.5, 97.5])
    found = difference_interval(first, second)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.6), pytest.approx(high, abs=0.6))


def test_average_interval_equals_its_normal_approximation_where_that_holds() -> None:
    correct = {"a": booleans(700, 1000), "b": booleans(300, 500)}
    error = 100 * np.sqrt((0.7 * 0.3 / 1000 + 0.6 * 0.4 / 500) / 4)
    found = average_interval(correct)
    assert found.low == pytest.approx(65 - 1.96 * error, abs=0.1)
    assert found.high == pytest.approx(65 + 1.96 * error, abs=0.1)
    assert average_interval(correct) == found


@pytest.mark.parametrize(
    ("gained", "lost", "count", "verdict"),
    [
        (40, 10, 400, "better"),
        (10, 40, 400, "worse"),
        (0, 0, 400, "no worse"),
        (3, 3, 2000, "no worse"),
        (12, 10, 100, "undecided"),
    ],
)
def test_verdicts(gained: int, lost: int, count: int, verdict: str) -> None:
    ours, theirs = np.zeros(count, bool), np.zeros(count, bool)
    ours[:gained] = True
    theirs[gained : gained + lost] = True
    tasks, average = compare({"a": ours}, {"a": theirs}, {"a": ours == theirs}, margin=1.0)
    assert tasks["a"].verdict == average.verdict == verdict
    assert tasks["a"].points == average.points == pytest.approx(100 * (gained - lost) / count)
    assert tasks["a"].interval == average.interval
    assert tasks["a"].agreement == pytest.approx(100 * (1 - (gained + lost) / count))


def test_looking_at_many_tasks_takes_more_to_be_significant() -> None:
    ours, theirs = np.zeros(100, bool), np.zeros(100, bool)
    ours[:7], theirs[7:8] = True, True
    even = np.zeros(100, bool)
    assert mcnemar(7, 1) > 0.05
    ours[8] = True
    assert mcnemar(8, 1) < 0.05
    alone, _ = compare({"a": ours}, {"a": theirs}, {"a": ours == theirs}, 1.0)
    assert alone["a"].verdict == "better"
    among = {"a": ours} | dict.fromkeys("bc", even)
    tasks, _ = compare(among, {"a": theirs, "b": even, "c": even}, among, 1.0)
    assert tasks["a"].p_value == pytest.approx(3 * mcnemar(8, 1))
    assert tasks["a"].verdict != "better"


def test_few_samples_that_all_agree_are_not_called_no_worse() -> None:
    same = np.ones(3, bool)
    _, average = compare({"a": same}, {"a": same}, {"a": same}, margin=1.0)
    assert average.verdict == "undecided"
