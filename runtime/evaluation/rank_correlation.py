"""Spearman's rank correlation, for tasks whose answers are numbers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from epmq_deploy.runtime.evaluation.metrics import Score
from epmq_deploy.runtime.evaluation.significance import (
    RESAMPLES,
    Floats,
    Interval,
    bootstrap_p_value,
    percentiles,
)

_SEED = 0
# Values resampled at a time, which bounds memory.
_BLOCK = 2**20


@dataclass(frozen=True)
class RankCorrelation(Score):
    """Spearman's rank correlation with the truth; 0 where all answers, or all truths, are equal.

    Intervals are those of the bootstrap over samples. To comparisons, half a sample is added for
    either model, as with accuracy, so that a few equal answers leave some doubt: one of the largest
    truth, which that model ranks highest and the other one in the middle.

    Attributes:
        predicted: ``[n]``; minus infinity where the answer was no number.
        truth: ``[n]``.
    """

    predicted: Floats
    truth: Floats

    metric = "Spearman's rank correlation with the truth, times 100"
    hub_name = "spearmanr"

    @property
    def percent(self) -> float:
        """Return the correlation, times 100."""
        from scipy.stats import spearmanr

        if len(set(self.predicted)) == 1 or len(set(self.truth)) == 1:
            return 0.0
        return 100.0 * float(spearmanr(self.predicted, self.truth).statistic)

    @property
    def interval(self) -> Interval:
        """Return the interval of the score."""
        return percentiles(self.draws(np.random.default_rng(_SEED)))

    def draws(self, rng: np.random.Generator) -> Floats:
        """Return scores of bootstrap samples."""
        blocks = _resampled(len(self.truth), 0, rng)
        return np.concatenate(
            [correlations(counts, self.predicted, self.truth) for counts in blocks]
        )

    def gains(self, reference: Score, rng: np.random.Generator) -> Floats:
        """Return gains of bootstrap samples."""
        assert isinstance(reference, RankCorrelation), "scores of one task are of one kind"
        ours, theirs = self.predicted, reference.predicted
        ours = np.append(ours, [np.inf, np.median(ours)])
        theirs = np.append(theirs, [np.median(theirs), np.inf])
        truth = np.append(self.truth, [np.inf, np.inf])
        return np.concatenate(
            [
                correlations(counts, ours, truth) - correlations(counts, theirs, truth)
                for counts in _resampled(len(self.truth), 2, rng)
            ]
        )

    def p_value(self, reference: Score, gains: Floats) -> float:
        """Return the p-value; of the bootstrap."""
        return bootstrap_p_value(gains)


def correlations(counts: Floats, first: Floats, second: Floats) -> Floats:
    """Return Spearman's rank correlation of bootstrap samples, given as counts.

    Own code: `scipy.stats.spearmanr` would need every bootstrap sample spelled out, 20,000 times
    the data, and has no samples that count half.

    Pearson's correlation of ranks, equal values sharing the mean of theirs (Spearman, The American
    Journal of Psychology 15, 1904).

    Args:
        counts: how often each sample holds each pair of values, ``[R, n]``.
        first: ``[n]``.
        second: ``[n]``.

    Returns:
        ``[R]``; 0 where either holds one value only.
    """
    middle = (counts.sum(axis=1, keepdims=True) + 1) / 2
    x, y = (_ranks(counts, values) - middle for values in (first, second))
    together = (counts * x * y).sum(axis=1)
    spread = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    found: Floats = np.divide(together, spread, out=np.zeros_like(together), where=spread > 0)
    return found


def _ranks(counts: Floats, values: Floats) -> Floats:
    """Mean rank of each value in each sample, ``[R, n]``."""
    order = np.argsort(values, kind="stable")
    _, starts, position = np.unique(values[order], return_index=True, return_inverse=True)
    equal = np.add.reduceat(counts[:, order], starts, axis=1)
    means = equal.cumsum(axis=1) - (equal - 1) / 2
    ranks = np.empty_like(counts)
    ranks[:, order] = means[:, position]
    return ranks


def _resampled(count: int, halves: int, rng: np.random.Generator) -> Iterator[Floats]:
    """How often ``RESAMPLES`` draws hold each of ``count`` samples, and some half as likely.

    Block by block ``[R, count + halves]``.
    """
    block = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        drawn = rng.integers(0, 2 * count + halves, (rows, count))
        chosen = np.where(drawn < 2 * count, drawn // 2, drawn - count)
        places = chosen + (count + halves) * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * (count + halves))
        yield counts.reshape(rows, count + halves).astype(np.float64)
