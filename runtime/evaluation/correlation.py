"""Correlations with the truth, for tasks whose answers are numbers."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np

from epmq_deploy.runtime.evaluation.bootstrap import ResampledScore
from epmq_deploy.runtime.evaluation.significance import Floats


@dataclass(frozen=True)
class Correlation(ResampledScore):
    """A correlation with the truth; 0 where all answers, or all truths, are equal.

    Attributes:
        predicted: ``[n]``.
        truth: ``[n]``.
    """

    predicted: Floats
    truth: Floats

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return len(self.truth)

    @property
    def percent(self) -> float:
        """Return the correlation, times 100."""
        if len(set(self.predicted)) == 1 or len(set(self.truth)) == 1:
            return 0.0
        return 100.0 * self._statistic()

    @abstractmethod
    def _statistic(self) -> float:
        """Return the correlation of values that differ."""


@dataclass(frozen=True)
class RankCorrelation(Correlation):
    """Spearman's rank correlation; answers that are no numbers are minus infinity."""

    metric = "Spearman's rank correlation with the truth, times 100"
    hub_name = "spearmanr"

    def _statistic(self) -> float:
        from scipy.stats import spearmanr

        return float(spearmanr(self.predicted, self.truth).statistic)

    def resampled(self, counts: Floats) -> Floats:
        """Return the correlation of bootstrap samples."""
        return rank_correlations(counts, self.predicted, self.truth)

    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both with two of the largest truth, ranking one highest, one in the middle."""
        ours, theirs = self.predicted, reference.predicted
        ours, theirs = (
            np.append(ours, [np.inf, np.median(ours)]),
            np.append(theirs, [np.median(theirs), np.inf]),
        )
        truth = np.append(self.truth, [np.inf, np.inf])
        return type(self)(ours, truth), type(self)(theirs, truth)


@dataclass(frozen=True)
class LinearCorrelation(Correlation):
    """Pearson's correlation."""

    metric = "Pearson's correlation with the truth, times 100"
    hub_name = "pearsonr"

    def _statistic(self) -> float:
        from scipy.stats import pearsonr

        return float(pearsonr(self.predicted, self.truth).statistic)

    def resampled(self, counts: Floats) -> Floats:
        """Return the correlation of bootstrap samples."""
        shape = counts.shape
        return weighted_correlations(
            counts, np.broadcast_to(self.predicted, shape), np.broadcast_to(self.truth, shape)
        )

    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both with two of the largest truth, answering its own largest and its median."""
        ours, theirs = self.predicted, reference.predicted
        ours, theirs = (
            np.append(ours, [ours.max(), np.median(ours)]),
            np.append(theirs, [np.median(theirs), theirs.max()]),
        )
        truth = np.append(self.truth, [self.truth.max()] * 2)
        return type(self)(ours, truth), type(self)(theirs, truth)


def weighted_correlations(counts: Floats, first: Floats, second: Floats) -> Floats:
    """Return Pearson's correlation of bootstrap samples, given as counts.

    Args:
        counts: how often each sample holds each pair of values, ``[R, n]``.
        first: ``[R, n]``.
        second: ``[R, n]``.

    Returns:
        ``[R]``; 0 where either holds one value only.
    """
    total = counts.sum(axis=1, keepdims=True)
    x, y = (
        values - (counts * values).sum(axis=1, keepdims=True) / total for values in (first, second)
    )
    together = (counts * x * y).sum(axis=1)
    spread = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    # Rounding leaves a trace of spread where all values are equal.
    equal = spread <= 1e-12 * total[:, 0]
    return np.asarray(np.divide(together, spread, out=np.zeros_like(together), where=~equal))


def rank_correlations(counts: Floats, first: Floats, second: Floats) -> Floats:
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
    return weighted_correlations(counts, _ranks(counts, first), _ranks(counts, second))


def _ranks(counts: Floats, values: Floats) -> Floats:
    """Mean rank of each value in each sample, ``[R, n]``."""
    order = np.argsort(values, kind="stable")
    _, starts, position = np.unique(values[order], return_index=True, return_inverse=True)
    equal = np.add.reduceat(counts[:, order], starts, axis=1)
    means = equal.cumsum(axis=1) - (equal - 1) / 2
    ranks = np.empty_like(counts)
    ranks[:, order] = means[:, position]
    return ranks
