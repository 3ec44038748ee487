"""Rank correlation against values by hand, a plain reference and resampling sample by sample."""

import numpy as np
import pytest

from epmq_deploy.runtime.evaluation.comparison import compare
from epmq_deploy.runtime.evaluation.correlation import RankCorrelation, rank_correlations
from epmq_deploy.runtime.evaluation.significance import Floats
from epmq_deploy.runtime.evaluation.text_scoring import NumberPredictions


def plain_ranks(values: list[float]) -> list[float]:
    """Mean of the places a value takes in order."""
    ordered = sorted(values)
    return [ordered.index(value) + 1 + (ordered.count(value) - 1) / 2 for value in values]


def plain(first: list[float], second: list[float]) -> float:
    """Pearson's correlation of ranks."""
    return float(np.corrcoef(plain_ranks(first), plain_ranks(second))[0, 1])


def noisy(count: int, noise: float, seed: int) -> RankCorrelation:
    """Answers with one decimal to truths with one."""
    truth = np.random.default_rng(0).uniform(0, 5, count).round(1)
    wrong = np.random.default_rng(seed).normal(0, noise, count)
    return RankCorrelation((truth + wrong).round(1), truth)


def constant(count: int) -> RankCorrelation:
    """The same answer to all."""
    return RankCorrelation(np.ones(count), np.arange(count, dtype=float))


@pytest.mark.parametrize(
    ("predicted", "percent"),
    [
        ([1, 2, 3, 4], 100),
        ([4, 3, 2, 1], -100),
        # Order alone counts.
        ([1, 10, 100, 1000], 100),
        ([2, 1, 3, 4], 80),
        ([7, 7, 7, 7], 0),
        # What is no number ranks lowest.
        ([-np.inf, 1, 2, 3], 100),
        ([1, 2, 3, -np.inf], -20),
    ],
)
def test_by_hand(predicted: list[float], percent: float) -> None:
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    assert RankCorrelation(np.array(predicted, float), truth).percent == pytest.approx(percent)


def test_equals_the_plain_reference_in_samples_that_repeat_values() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 6, 15).astype(float), rng.integers(0, 6, 15).astype(float)
    counts = rng.integers(0, 4, (20, 15)).astype(float)
    for row, found in zip(counts, rank_correlations(counts, first, second), strict=True):
        chosen = np.repeat(np.arange(15), row.astype(int))
        assert found == pytest.approx(plain(first[chosen].tolist(), second[chosen].tolist()))


def resampled(*scores: RankCorrelation) -> Floats:
    """One score, or what it gains on the next, sample by sample, without what is added."""
    rng = np.random.default_rng(3)
    count, found = len(scores[0].truth), []
    for _ in range(1000):
        drawn = rng.integers(0, count, count)
        truth = scores[0].truth[drawn].tolist()
        values = [plain(score.predicted[drawn].tolist(), truth) for score in scores]
        found.append(values[0] - sum(values[1:]))
    return np.array(found)


def test_intervals_are_those_of_resampling() -> None:
    ours, theirs = noisy(150, 1.0, 1), noisy(150, 1.6, 2)
    low, high = np.percentile(100 * resampled(ours), [2.5, 97.5])
    assert ours.interval.low == pytest.approx(low, abs=0.7)
    assert ours.interval.high == pytest.approx(high, abs=0.7)
    gains = ours.gains(theirs, np.random.default_rng(0))
    expected = np.percentile(resampled(ours, theirs), [2.5, 97.5])
    assert np.percentile(gains, [2.5, 97.5]) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (noisy(400, 0.5, 1), noisy(400, 2.0, 2), "better"),
        (noisy(400, 2.0, 1), noisy(400, 0.5, 2), "worse"),
        (noisy(1500, 0.5, 1), noisy(1500, 0.5, 1), "no worse"),
        # Few answers that are all the same leave doubt.
        (noisy(5, 0.5, 1), noisy(5, 0.5, 1), "undecided"),
        (constant(5), constant(5), "undecided"),
    ],
)
def test_verdicts(ours: RankCorrelation, theirs: RankCorrelation, verdict: str) -> None:
    same = {"a": ours.predicted == theirs.predicted}
    tasks, average = compare({"a": ours}, {"a": theirs}, same, margin=1.0)
    assert tasks["a"].verdict == average.verdict == verdict
    assert tasks["a"].points == pytest.approx(ours.percent - theirs.percent)


def test_texts_are_read_as_numbers() -> None:
    truth = np.array(["1.0", "2.5", "3.0", "3.8"])
    answers = np.array(["-1", "2.50", "1e1", "4"])
    predictions = NumberPredictions(
        truth, {"numbers": answers, "words": np.array(["1", "a", "one", "1,5"])}
    )
    score = predictions.score("numbers")
    assert score.truth.tolist() == [1.0, 2.5, 3.0, 3.8]
    assert score.predicted.tolist() == [-1.0, 2.5, 10.0, 4.0]
    assert score.percent == pytest.approx(80)
    assert predictions.score("words").predicted.tolist() == [1.0, *[-np.inf] * 3]
    odd = NumberPredictions(truth, {"odd": np.array(["nan", "inf", "", "one"])})
    assert not np.isfinite(odd.score("odd").predicted).any()
    assert odd.score("odd").percent == 0
