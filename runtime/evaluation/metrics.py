"""How well a model does on one task: what every metric has to provide, and accuracy."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from epmq_deploy.runtime.evaluation.significance import (
    RESAMPLES,
    Booleans,
    Floats,
    Interval,
    mcnemar,
    wilson,
)


class Score(ABC):
    """One model's score on the samples of one task.

    Attributes:
        metric: what it is, for notes; empty for accuracy.
        hub_name: the metric as the Hugging Face hub names it.
    """

    metric: ClassVar[str] = ""
    hub_name: ClassVar[str] = "accuracy"

    @property
    @abstractmethod
    def percent(self) -> float:
        """The score, 100 at best."""

    @property
    @abstractmethod
    def interval(self) -> Interval:
        """Of ``percent``."""

    @abstractmethod
    def draws(self, rng: np.random.Generator) -> Floats:
        """Return the score of ``RESAMPLES`` bootstrap samples, 1 at best."""

    @abstractmethod
    def gains(self, reference: "Score", rng: np.random.Generator) -> Floats:
        """Return what ``RESAMPLES`` bootstrap samples gain on a score of the same samples."""

    @abstractmethod
    def p_value(self, reference: "Score", gains: Floats) -> float:
        """Two-sided, that both models are equally good; ``gains`` as `gains` drew them."""


@dataclass(frozen=True)
class Accuracy(Score):
    """The share of samples that are predicted correctly.

    Own code where `scipy.stats.bootstrap` would resample every prediction: resampling with
    replacement makes counts multinomial, which are drawn here at once (Efron &
    Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). Half a sample is added to
    each possible outcome, as in Agresti & Min (Statistics in Medicine 24, 2005), so that a few
    samples with the same outcome leave some doubt.

    Attributes:
        correct: which samples are, ``[n]``.
    """

    correct: Booleans

    @property
    def percent(self) -> float:
        """Return the share of correct predictions."""
        return 100.0 * float(self.correct.mean())

    @property
    def interval(self) -> Interval:
        """Return the interval of the score."""
        return wilson(int(self.correct.sum()), len(self.correct))

    def draws(self, rng: np.random.Generator) -> Floats:
        """Return scores of bootstrap samples."""
        count = len(self.correct)
        share = (int(self.correct.sum()) + 0.5) / (count + 1)
        return rng.binomial(count, share, RESAMPLES) / count

    def gains(self, reference: Score, rng: np.random.Generator) -> Floats:
        """Return gains of bootstrap samples."""
        gained, lost = self._discordant(reference)
        count = len(self.correct)
        shares = np.array([gained + 0.5, lost + 0.5, count - gained - lost + 1]) / (count + 2)
        outcomes = rng.multinomial(count, shares, RESAMPLES)
        return np.asarray((outcomes[:, 0] - outcomes[:, 1]) / count)

    def p_value(self, reference: Score, gains: Floats) -> float:
        """Return the p-value; exact, from the counts alone."""
        return mcnemar(*self._discordant(reference))

    def _discordant(self, reference: Score) -> tuple[int, int]:
        """Return samples that only this model, and only the reference, predicts correctly."""
        assert isinstance(reference, Accuracy), "scores of one task are of one kind"
        ours, theirs = self.correct, reference.correct
        return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
