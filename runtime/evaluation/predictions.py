"""What models predict for the samples of one task, and how well, by the task's metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from epmq_deploy.recipe import MetricName, ProblemType, Task
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.runtime.evaluation.average_precision import MeanAveragePrecision
from epmq_deploy.runtime.evaluation.correlation import LinearCorrelation, RankCorrelation
from epmq_deploy.runtime.evaluation.label_scores import LABEL_SCORES
from epmq_deploy.runtime.evaluation.metrics import Accuracy, Score
from epmq_deploy.runtime.evaluation.significance import Booleans

Predicted = npt.NDArray[Any]

# The first is the task's score, the others stand beside it.
_DEFAULTS: Mapping[ProblemType, tuple[MetricName, ...]] = {
    SINGLE_LABEL: ("accuracy",),
    MULTI_LABEL: ("micro_f1", "macro_f1", "mean_average_precision"),
    REGRESSION: ("spearmanr", "pearsonr"),
}
_FITTING: Mapping[ProblemType, tuple[MetricName, ...]] = {
    SINGLE_LABEL: ("accuracy", "f1", "macro_f1", "matthews_correlation"),
    MULTI_LABEL: ("micro_f1", "macro_f1", "mean_average_precision", "accuracy"),
    REGRESSION: ("spearmanr", "pearsonr"),
}
# Values that differ by less than this share of the truth's standard deviation count as the same.
_SAME = 0.05


def metrics_of(task: Task, head: HeadClasses) -> tuple[MetricName, ...]:
    """Return the metrics of a task with a head; the first is its score.

    Raises:
        RecipeError: a metric does not fit the head.
    """
    kind = head.problem_type
    return _fitting(task.metric or _DEFAULTS[kind], _FITTING[kind], head.count, kind)


def metrics_of_text(task: Task) -> tuple[MetricName, ...]:
    """Return the metrics of a text-generation task; the first is its score.

    Raises:
        RecipeError: a metric does not fit the answers.
    """
    prompt = task.prompt or Prompt()
    if prompt.decimals is not None:
        return _fitting(task.metric or ("spearmanr",), ("spearmanr",), None, "prompt.decimals")
    given = task.metric or ("accuracy",)
    if prompt.answers is None:
        return _fitting(given, ("accuracy",), None, "free answers")
    return _fitting(given, _FITTING[SINGLE_LABEL], len(prompt.answers), "prompt.answers")


def _fitting(
    metrics: tuple[MetricName, ...],
    fitting: tuple[MetricName, ...],
    classes: int | None,
    kind: str,
) -> tuple[MetricName, ...]:
    """Return metrics that are among the fitting ones."""
    if wrong := [name for name in metrics if name not in fitting]:
        raise RecipeError(
            f"metric {wrong[0]} does not fit {kind}; choose from {', '.join(fitting)}"
        )
    if "f1" in metrics and classes not in (None, 2):
        raise RecipeError(f"metric f1 is for 2 classes, and there are {classes}; choose macro_f1")
    return metrics


@dataclass(frozen=True)
class TaskPredictions:
    """What every model predicts for the samples of one task.

    Attributes:
        truth: ``[n]``, of any type that ``==`` compares (class numbers, texts).
        predicted: by model name, likewise.
        metrics: names; the first is the task's score.
        classes: ``C``, where predictions are class numbers.
    """

    truth: Predicted
    predicted: Mapping[str, Predicted]
    metrics: Sequence[MetricName] = ("accuracy",)
    classes: int = 0

    def score(self, model: str) -> Score:
        """Return a model's score by the first metric."""
        return self._by(self.metrics[0], model)

    def percents(self, model: str) -> dict[str, float]:
        """Return a model's scores by all metrics."""
        return {metric: self._by(metric, model).percent for metric in self.metrics}

    def same(self, model: str, other: str) -> Booleans:
        """Return for which samples two models predict the same, ``[n]``."""
        return np.asarray(self.predicted[model] == self.predicted[other], dtype=np.bool_)

    def recalls(self, model: str) -> list[float | None]:
        """Return the percentage of each class's samples that a model predicts; None without any."""
        hits = self.predicted[model] == self.truth
        return [
            100.0 * float(hits[held].mean()) if (held := self.truth == number).any() else None
            for number in range(self.classes)
        ]

    def _by(self, metric: MetricName, model: str) -> Score:
        if metric == "accuracy":
            return Accuracy(np.asarray(self.predicted[model] == self.truth, dtype=np.bool_))
        return LABEL_SCORES[metric](self.predicted[model], self.truth, self.classes)


class LabelSetPredictions(TaskPredictions):
    """Any number of labels per sample.

    ``predicted`` are logits ``[n, C]``; labels above 0 apply. ``truth`` is ``[n, C]`` of 0 and 1.
    """

    def same(self, model: str, other: str) -> Booleans:
        """Return for which samples two models predict the same labels, ``[n]``."""
        return np.asarray((self._labels(model) == self._labels(other)).all(axis=1))

    def recalls(self, model: str) -> list[float | None]:
        """Return the percentage of the samples with each label that a model gives it."""
        labels = self._labels(model)
        return [
            100.0 * float(labels[held, number].mean())
            if (held := self.truth[:, number] == 1).any()
            else None
            for number in range(self.truth.shape[1])
        ]

    def _labels(self, model: str) -> npt.NDArray[np.int64]:
        return (self.predicted[model] > 0).astype(np.int64)

    def _by(self, metric: MetricName, model: str) -> Score:
        if metric == "accuracy":
            return Accuracy(np.asarray((self._labels(model) == self.truth).all(axis=1)))
        if metric == "mean_average_precision":
            return MeanAveragePrecision(self.predicted[model].astype(np.float64), self.truth)
        return LABEL_SCORES[metric](self._labels(model), self.truth, self.truth.shape[1])


class ValuePredictions(TaskPredictions):
    """Values ``[n]`` of a regression head."""

    def same(self, model: str, other: str) -> Booleans:
        """Return for which samples two models' values are close, ``[n]``."""
        tolerance = _SAME * float(self.truth.std())
        return np.asarray(np.abs(self.predicted[model] - self.predicted[other]) <= tolerance)

    def recalls(self, model: str) -> list[float | None]:
        """Return nothing: values have no classes."""
        return []

    def _by(self, metric: MetricName, model: str) -> Score:
        kind = RankCorrelation if metric == "spearmanr" else LinearCorrelation
        return kind(self.predicted[model].astype(np.float64), self.truth)


# What of a batch's logits ``[n, C]`` is kept, and how it is scored.
KEPT: Mapping[ProblemType, Callable[[Predicted], Predicted]] = {
    SINGLE_LABEL: lambda logits: logits.argmax(axis=1),
    MULTI_LABEL: lambda logits: logits,
    REGRESSION: lambda logits: logits[:, 0],
}
PREDICTIONS: Mapping[ProblemType, type[TaskPredictions]] = {
    SINGLE_LABEL: TaskPredictions,
    MULTI_LABEL: LabelSetPredictions,
    REGRESSION: ValuePredictions,
}
