"""Statistics equal those of scipy and statsmodels, from which most of them come."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from epmq_deploy.runtime.evaluation.correlation import rank_correlations
from epmq_deploy.runtime.evaluation.significance import holm, mcnemar, median_interval, wilson


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 500, 10_000])
def test_wilson(count: int) -> None:
    for hits in {0, 1, count // 3, count // 2, count - 1, count}:
        low, high = proportion_confint(hits, count, method="wilson")
        interval = wilson(hits, count)
        assert interval.low == pytest.approx(100 * low, abs=1e-10)
        assert interval.high == pytest.approx(100 * high, abs=1e-10)


def test_mcnemar() -> None:
    for gained in (0, 1, 3, 10, 100, 900):
        for lost in (1, 2, 10, 120, 900):
            expected = stats.binomtest(min(gained, lost), gained + lost).pvalue
            assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def frozen_objects() -> Iterator[None]:
    """Each call of statsmodels collects garbage; what is alive already need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_objects")
def test_holm_and_medians_of_random_values() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        p_values = rng.random(rng.integers(1, 12)) ** 3
        assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))
        values = rng.random(rng.integers(6, 60))
        expected = stats.quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
        interval = median_interval(list(values))
        assert interval is not None
        assert (interval.low, interval.high) == (expected.low, expected.high)


def test_spearman_with_equal_values() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        first, second = rng.integers(0, 5, (2, 30)).astype(float)
        once = np.ones((1, 30))
        expected = stats.spearmanr(first, second).statistic
        assert rank_correlations(once, first, second)[0] == pytest.approx(expected, abs=1e-12)
