"""Comparing models: intervals against resampling, verdicts on made-up outcomes."""

from collections.abc import Mapping

import numpy as np
import pytest

from epmq_deploy.runtime.evaluation.comparison import Difference, average_interval, compare
from epmq_deploy.runtime.evaluation.metrics import Accuracy
from epmq_deploy.runtime.evaluation.significance import Booleans, mcnemar


def share(hits: int, count: int) -> Booleans:
    """The first of so many samples are correct."""
    return np.arange(count) < hits


def accuracies(correct: Mapping[str, Booleans]) -> dict[str, Accuracy]:
    return {task: Accuracy(hits) for task, hits in correct.items()}


def compared(
    ours: Mapping[str, Booleans], theirs: Mapping[str, Booleans]
) -> tuple[dict[str, Difference], Difference]:
    """Of two classes, so that both are right or wrong where they agree."""
    same = {task: hits == theirs[task] for task, hits in ours.items()}
    return compare(accuracies(ours), accuracies(theirs), same, margin=1.0)


def test_the_interval_of_the_average_equals_resampling_of_pairs() -> None:
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
    found = compared(first, second)[1].interval
    assert (found.low, found.high) == (pytest.approx(low, abs=0.6), pytest.approx(high, abs=0.6))


def test_average_interval_equals_its_normal_approximation_where_that_holds() -> None:
    correct = {"a": share(700, 1000), "b": share(300, 500)}
    error = 100 * np.sqrt((0.7 * 0.3 / 1000 + 0.6 * 0.4 / 500) / 4)
    found = average_interval(accuracies(correct))
    assert found.low == pytest.approx(65 - 1.96 * error, abs=0.1)
    assert found.high == pytest.approx(65 + 1.96 * error, abs=0.1)
    assert average_interval(accuracies(correct)) == found


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
    tasks, average = compared({"a": ours}, {"a": theirs})
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
    alone, _ = compared({"a": ours}, {"a": theirs})
    assert alone["a"].verdict == "better"
    among = {"a": ours} | dict.fromkeys("bc", even)
    tasks, _ = compared(among, {"a": theirs, "b": even, "c": even})
    assert tasks["a"].p_value == pytest.approx(3 * mcnemar(8, 1))
    assert tasks["a"].verdict != "better"


def test_few_samples_that_all_agree_are_not_called_no_worse() -> None:
    same = np.ones(3, bool)
    _, average = compared({"a": same}, {"a": same})
    assert average.verdict == "undecided"
