"""Intervals and tests against published values and references that enumerate."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from epmq_deploy.runtime.evaluation.significance import (
    bootstrap_p_value,
    holm,
    mcnemar,
    percentiles,
    wilson,
)


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


def test_bootstrap_p_value_counts_the_rarer_side() -> None:
    assert bootstrap_p_value(np.array([1.0] * 97 + [-1.0, 0.0])) == pytest.approx(2 * 3 / 100)
    assert bootstrap_p_value(np.zeros(50)) == 1.0


def test_percentiles_leave_a_fortieth_on_either_side() -> None:
    found = percentiles(np.arange(1001) / 1000)
    assert (found.low, found.high) == (pytest.approx(2.5), pytest.approx(97.5))
