"""Scores of bootstrap samples against scikit-learn and scipy on the samples spelled out."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef

from epmq_deploy.runtime.evaluation.average_precision import MeanAveragePrecision
from epmq_deploy.runtime.evaluation.bootstrap import ResampledScore
from epmq_deploy.runtime.evaluation.correlation import LinearCorrelation
from epmq_deploy.runtime.evaluation.label_scores import F1, MacroF1, Matthews, MicroF1

RNG = np.random.default_rng(3)
COUNT = 40
BINARY = RNG.integers(0, 2, (2, COUNT))
CLASSES = RNG.integers(0, 4, (2, COUNT))
LABELS = RNG.integers(0, 2, (2, COUNT, 5))
# With ties.
SCORES = RNG.normal(size=(COUNT, 5)).round(1)
VALUES = RNG.normal(size=(2, COUNT))
CASES: dict[str, tuple[ResampledScore, Callable[[np.ndarray], float]]] = {
    "f1": (F1(BINARY[0], BINARY[1], 2), lambda rows: f1_score(BINARY[1][rows], BINARY[0][rows])),
    "macro": (
        MacroF1(CLASSES[0], CLASSES[1], 4),
        lambda rows: f1_score(CLASSES[1][rows], CLASSES[0][rows], average="macro"),
    ),
    "matthews": (
        Matthews(CLASSES[0], CLASSES[1], 4),
        lambda rows: matthews_corrcoef(CLASSES[1][rows], CLASSES[0][rows]),
    ),
    "micro": (
        MicroF1(LABELS[0], LABELS[1], 5),
        lambda rows: f1_score(LABELS[1][rows], LABELS[0][rows], average="micro"),
    ),
    "macro of labels": (
        MacroF1(LABELS[0], LABELS[1], 5),
        lambda rows: f1_score(LABELS[1][rows], LABELS[0][rows], average="macro"),
    ),
    "average precision": (
        MeanAveragePrecision(SCORES, LABELS[1]),
        lambda rows: average_precision_score(LABELS[1][rows], SCORES[rows]),
    ),
    "pearson": (
        LinearCorrelation(VALUES[0], VALUES[1]),
        lambda rows: float(pearsonr(VALUES[0][rows], VALUES[1][rows]).statistic),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bootstrap_samples_score_as_the_library_scores_them(name: str) -> None:
    score, library = CASES[name]
    assert score.percent == pytest.approx(100 * library(np.arange(COUNT)))
    counts = np.random.default_rng(0).multinomial(COUNT, [1 / COUNT] * COUNT, 25).astype(float)
    expected = [library(np.repeat(np.arange(COUNT), row.astype(int))) for row in counts]
    assert score.resampled(counts) == pytest.approx(expected, abs=1e-9)
    low, high = score.interval.low, score.interval.high
    assert low < score.percent < high


@pytest.mark.parametrize("name", CASES)
def test_equal_predictions_leave_some_doubt_and_no_gain(name: str) -> None:
    score, _ = CASES[name]
    gains = score.gains(score, np.random.default_rng(0))
    assert abs(gains.mean()) < 0.02
    assert gains.std() > 0
    assert score.p_value(score, gains) > 0.2


@pytest.mark.parametrize("name", ["f1", "macro", "matthews", "micro", "macro of labels"])
def test_perfect_predictions_are_better_than_random_ones(name: str) -> None:
    score, _ = CASES[name]
    perfect = type(score)(score.truth, score.truth, score.classes)  # type: ignore[attr-defined,call-arg]
    assert perfect.percent == 100
    gains = perfect.gains(score, np.random.default_rng(0))
    assert perfect.p_value(score, gains) < 0.01
    assert gains.mean() > 0


def test_labels_that_nobody_has_or_predicts_do_not_count() -> None:
    truth, predicted = np.array([0, 1, 0, 1]), np.array([0, 1, 1, 1])
    wide = MacroF1(predicted, truth, 9)
    assert wide.percent == MacroF1(predicted, truth, 2).percent
    assert wide.resampled(np.ones((1, 4))) == pytest.approx([wide.percent / 100])
    never = MeanAveragePrecision(np.zeros((3, 2)), np.array([[1, 0], [0, 0], [1, 0]]))
    assert never.percent == pytest.approx(100 * 2 / 3)
