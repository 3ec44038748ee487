"""Scores of benchmarks and their standard errors."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr


@pytest.fixture(scope="module")
def scoring() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "scoring.py"
    spec = importlib.util.spec_from_file_location("scoring", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classes_are_scored_by_the_share_that_is_right(scoring: ModuleType) -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    assert scoring.score(logits, torch.tensor([0, 1, 1, 0])) == 75.0


def test_values_are_scored_by_their_ranks(scoring: ModuleType) -> None:
    values = torch.tensor([[0.1], [0.4], [0.3], [90.0]])
    truth = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = 100 * spearmanr([0.1, 0.4, 0.3, 90.0], [1, 2, 3, 4]).statistic
    assert scoring.score(values, truth) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_standard_error_of_shares_is_their_spread(scoring: ModuleType, share: float) -> None:
    shares = 100 * np.random.default_rng(0).binomial(400, share, size=20000) / 400
    assert scoring.standard_error(100 * share, 400, values=False) == pytest.approx(
        shares.std(), rel=0.03
    )


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.7])
def test_standard_error_of_rank_correlations_is_their_spread(
    scoring: ModuleType, correlation: float
) -> None:
    rng = np.random.default_rng(1)
    covariance = [[1, correlation], [correlation, 1]]
    scores = [
        100 * spearmanr(rng.multivariate_normal([0, 0], covariance, size=200)).statistic
        for _ in range(500)
    ]
    error = scoring.standard_error(float(np.mean(scores)), 200, values=True)
    assert error == pytest.approx(float(np.std(scores)), rel=0.1)
