"""Mean average precision of heads for any number of labels."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from epmq_deploy.runtime.evaluation.bootstrap import ResampledScore
from epmq_deploy.runtime.evaluation.significance import Floats


@dataclass(frozen=True)
class MeanAveragePrecision(ResampledScore):
    """The mean of average precision over labels that any sample has.

    Attributes:
        scores: of each label, ``[n, C]``; their order counts.
        truth: ``[n, C]`` of 0 and 1.
    """

    scores: Floats
    truth: npt.NDArray[np.int64]

    metric = "mean average precision, times 100"
    hub_name = "mean_average_precision"

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return len(self.truth)

    @property
    def percent(self) -> float:
        """Return the score, times 100."""
        from sklearn.metrics import average_precision_score

        held = self.truth.any(axis=0)
        if not held.any():
            return 0.0
        return 100.0 * float(average_precision_score(self.truth[:, held], self.scores[:, held]))

    def resampled(self, counts: Floats) -> Floats:
        """Return the score of bootstrap samples; labels they do not hold do not count."""
        total, held = np.zeros(len(counts)), np.zeros(len(counts))
        for scores, truth in zip(self.scores.T, self.truth.T, strict=True):
            precision, positives = _average_precision(counts, scores, truth)
            total += precision
            held += positives > 0
        return np.asarray(np.divide(total, held, out=np.zeros_like(total), where=held > 0))

    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both with two samples of the most frequent label, each ranking one first."""
        label = int(self.truth.sum(axis=0).argmax())
        row = np.eye(self.truth.shape[1], dtype=np.int64)[label]
        truth = np.concatenate([self.truth, [row, row]])
        both = []
        for score, first in ((self, True), (reference, False)):
            middle = np.median(score.scores, axis=0)
            known = np.where(row == 1, np.inf, middle)
            added = [known, middle] if first else [middle, known]
            both.append(type(self)(np.concatenate([score.scores, added]), truth))
        return both[0], both[1]


def _average_precision(
    counts: Floats, scores: Floats, truth: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return a label's average precision in each bootstrap sample and its number of positives.

    Equal scores are one step, as in scikit-learn.
    """
    order = np.argsort(-scores, kind="stable")
    _, firsts = np.unique(-scores[order], return_index=True)
    positives = np.add.reduceat(counts[:, order] * truth[order], firsts, axis=1)
    all_of_step = np.add.reduceat(counts[:, order], firsts, axis=1)
    seen = all_of_step.cumsum(axis=1)
    hits = positives.cumsum(axis=1)
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    number = hits[:, -1]
    summed = (precision * positives).sum(axis=1)
    return np.divide(summed, number, out=np.zeros_like(summed), where=number > 0), number
