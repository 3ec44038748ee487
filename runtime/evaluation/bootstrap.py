"""Scores whose intervals and tests are those of the bootstrap over samples."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Self

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


class ResampledScore(Score):
    """A score that can be computed for many bootstrap samples at once.

    To comparisons, half a sample is added for either model, as with accuracy, so that a few equal
    predictions leave some doubt: one that this model predicts well and the other one does not.
    """

    @property
    @abstractmethod
    def count(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def resampled(self, counts: Floats) -> Floats:
        """Return the score, 1 at best, of bootstrap samples.

        Args:
            counts: how often each holds each sample, ``[R, n]``.

        Returns:
            ``[R]``.
        """

    @abstractmethod
    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both scores with a sample that only this model, and one that only the other knows.

        Args:
            reference: of the same samples.
        """

    @property
    def interval(self) -> Interval:
        """Return the interval of the score."""
        return percentiles(self.draws(np.random.default_rng(_SEED)))

    def draws(self, rng: np.random.Generator) -> Floats:
        """Return scores of bootstrap samples."""
        return np.concatenate([self.resampled(counts) for counts in _drawn(self.count, 0, rng)])

    def gains(self, reference: Score, rng: np.random.Generator) -> Floats:
        """Return gains of bootstrap samples."""
        assert isinstance(reference, type(self)), "scores of one task are of one kind"
        ours, theirs = self.with_doubt(reference)
        return np.concatenate(
            [
                ours.resampled(counts) - theirs.resampled(counts)
                for counts in _drawn(self.count, 2, rng)
            ]
        )

    def p_value(self, reference: Score, gains: Floats) -> float:
        """Return the p-value; of the bootstrap."""
        return bootstrap_p_value(gains)


def _drawn(count: int, halves: int, rng: np.random.Generator) -> Iterator[Floats]:
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
