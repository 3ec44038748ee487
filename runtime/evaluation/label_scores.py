"""Scores of predicted classes and labels beside accuracy, as scikit-learn defines them.

The score itself is scikit-learn's. Bootstrap samples are scored here, all at once, from sums that
all these scores are made of: how often each label is true, predicted, and both.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from epmq_deploy.runtime.evaluation.bootstrap import ResampledScore
from epmq_deploy.runtime.evaluation.significance import Floats

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sums:
    """Counts of bootstrap samples.

    Attributes:
        both: how often each label is true and predicted, ``[R, C]``.
        predicted: how often it is predicted, ``[R, C]``.
        true: how often it is true, ``[R, C]``.
        total: number of samples, ``[R]``.
    """

    both: Floats
    predicted: Floats
    true: Floats
    total: Floats


@dataclass(frozen=True)
class LabelScore(ResampledScore):
    """A score of classes ``[n]``, or of labels ``[n, C]`` of 0 and 1.

    Attributes:
        predicted: class numbers, or labels.
        truth: likewise.
        classes: ``C``.
    """

    predicted: Labels
    truth: Labels
    classes: int

    # The class of samples that are added for doubt; the most frequent one where it is None.
    positive: ClassVar[int | None] = None

    @staticmethod
    @abstractmethod
    def compute(truth: Labels, predicted: Labels) -> float:
        """Return the score, 1 at best."""

    @staticmethod
    @abstractmethod
    def of_sums(sums: Sums) -> Floats:
        """Return the score of bootstrap samples, ``[R]``."""

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return len(self.truth)

    @property
    def percent(self) -> float:
        """Return the score, times 100."""
        return 100.0 * type(self).compute(self.truth, self.predicted)

    def resampled(self, counts: Floats) -> Floats:
        """Return the score of bootstrap samples."""
        both, predicted, true = (np.asarray((m.T @ counts.T).T) for m in self._incidence)
        return type(self).of_sums(Sums(both, predicted, true, counts.sum(axis=1)))

    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both with two samples of one class, of which each predicts one and none."""
        frequent = int(_matrix(self.truth, self.classes).sum(axis=0).argmax())
        right = frequent if self.positive is None else self.positive
        if self.truth.ndim == 1:
            added, none = np.array([right, right]), (right + 1) % self.classes
            known, unknown = np.array([right, none]), np.array([none, right])
        else:
            row = np.eye(self.classes, dtype=np.int64)[right]
            added = np.stack([row, row])
            known, unknown = np.stack([row, 0 * row]), np.stack([0 * row, row])
        truth = np.concatenate([self.truth, added])
        ours = np.concatenate([self.predicted, known])
        theirs = np.concatenate([reference.predicted, unknown])
        return type(self)(ours, truth, self.classes), type(self)(theirs, truth, self.classes)

    @cached_property
    def _incidence(self) -> tuple[Any, Any, Any]:
        """Which labels are both true and predicted, which are predicted, which true, ``[n, C]``.

        Sparse: most classes are not those of a sample.
        """
        from scipy.sparse import csr_array

        true, predicted = (_matrix(labels, self.classes) for labels in (self.truth, self.predicted))
        both, predicted, true = (
            csr_array(matrix.astype(np.float64)) for matrix in (true * predicted, predicted, true)
        )
        return both, predicted, true


def _matrix(labels: Labels, classes: int) -> Labels:
    """Return labels ``[n, C]`` of 0 and 1."""
    return labels if labels.ndim == 2 else np.eye(classes, dtype=np.int64)[labels]


def _f1(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], average: str) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth, predicted, average=average, zero_division=0))


def _matthews(truth: Labels, predicted: Labels) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, predicted))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide; 0 where the denominator is."""
    return np.asarray(
        np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
    )


class F1(LabelScore):
    """F1 of the second class, as GLUE measures MRPC and QQP."""

    metric = "F1 of the second class, times 100"
    hub_name = "f1"
    positive = 1

    @staticmethod
    def compute(truth: Labels, predicted: Labels) -> float:
        """Return scikit-learn's ``f1_score`` of the second class, whatever else is predicted."""
        return _f1(np.equal(truth, 1), np.equal(predicted, 1), "binary")

    @staticmethod
    def of_sums(sums: Sums) -> Floats:
        """Return the score of bootstrap samples."""
        return _ratio(2 * sums.both[:, 1], sums.predicted[:, 1] + sums.true[:, 1])


class MacroF1(LabelScore):
    """The mean of all labels' F1."""

    metric = "F1, averaged over labels (macro), times 100"
    hub_name = "f1"

    @staticmethod
    def compute(truth: Labels, predicted: Labels) -> float:
        """Return scikit-learn's ``f1_score``."""
        return _f1(truth, predicted, "macro")

    @staticmethod
    def of_sums(sums: Sums) -> Floats:
        """Return the score of bootstrap samples; labels they do not hold do not count."""
        size = sums.predicted + sums.true
        return np.asarray(_ratio(2 * sums.both, size).sum(axis=1) / (size > 0).sum(axis=1))


class MicroF1(LabelScore):
    """F1 of all labels together."""

    metric = "F1 of all labels together (micro), times 100"
    hub_name = "f1"

    @staticmethod
    def compute(truth: Labels, predicted: Labels) -> float:
        """Return scikit-learn's ``f1_score``."""
        return _f1(truth, predicted, "micro")

    @staticmethod
    def of_sums(sums: Sums) -> Floats:
        """Return the score of bootstrap samples."""
        return _ratio(2 * sums.both.sum(axis=1), (sums.predicted + sums.true).sum(axis=1))


class Matthews(LabelScore):
    """Matthews correlation (for several classes, Gorodkin, Comput. Biol. Chem. 28, 2004)."""

    metric = "Matthews correlation, times 100"
    hub_name = "matthews_correlation"

    @staticmethod
    def compute(truth: Labels, predicted: Labels) -> float:
        """Return scikit-learn's ``matthews_corrcoef``."""
        return _matthews(truth, predicted)

    @staticmethod
    def of_sums(sums: Sums) -> Floats:
        """Return the score of bootstrap samples."""
        square = sums.total**2
        together = sums.both.sum(axis=1) * sums.total - (sums.predicted * sums.true).sum(axis=1)
        spread = (square - (sums.predicted**2).sum(axis=1)) * (square - (sums.true**2).sum(axis=1))
        return _ratio(together, np.sqrt(np.maximum(spread, 0)))


LABEL_SCORES: Mapping[str, type[LabelScore]] = {
    "f1": F1,
    "macro_f1": MacroF1,
    "micro_f1": MicroF1,
    "matthews_correlation": Matthews,
}
