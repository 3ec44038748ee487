"""What models predict for the samples of one task, and how well, by the task's metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from epmq_deploy.data.class_labels import HeadClasses, listed
from epmq_deploy.data.samples import EmbeddingSamples, Samples
from epmq_deploy.data.targets import IGNORED
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.problem_types import (
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    TOKEN,
)
from epmq_deploy.recipe import MetricName, ProblemType, Task
from epmq_deploy.recipe.prompt import Prompt
from epmq_deploy.runtime.evaluation.average_precision import MeanAveragePrecision
from epmq_deploy.runtime.evaluation.correlation import LinearCorrelation, RankCorrelation
from epmq_deploy.runtime.evaluation.entity_f1 import EntityF1, spell_entities
from epmq_deploy.runtime.evaluation.label_scores import LABEL_SCORES
from epmq_deploy.runtime.evaluation.metrics import Accuracy, Score
from epmq_deploy.runtime.evaluation.retrieval import Ndcg, similarities
from epmq_deploy.runtime.evaluation.significance import Booleans

Predicted = npt.NDArray[Any]

# The first is the task's score, the others stand beside it.
_DEFAULTS: Mapping[ProblemType, tuple[MetricName, ...]] = {
    SINGLE_LABEL: ("accuracy",),
    MULTI_LABEL: ("micro_f1", "macro_f1", "mean_average_precision"),
    REGRESSION: ("spearmanr", "pearsonr"),
    TOKEN: ("seqeval_f1", "accuracy"),
    EMBEDDING: ("spearmanr", "pearsonr"),
}
_FITTING: Mapping[ProblemType, tuple[MetricName, ...]] = {
    SINGLE_LABEL: ("accuracy", "f1", "macro_f1", "matthews_correlation"),
    MULTI_LABEL: ("micro_f1", "macro_f1", "mean_average_precision", "accuracy"),
    REGRESSION: ("spearmanr", "pearsonr"),
    TOKEN: ("seqeval_f1", "accuracy", "macro_f1"),
    EMBEDDING: ("spearmanr", "pearsonr", "ndcg_at_10"),
}
# Values that differ by less than this share of the truth's standard deviation count as the same.
_SAME = 0.05


def metrics_of(task: Task, head: HeadClasses) -> tuple[MetricName, ...]:
    """Return the metrics of a task with a head; the first is its score.

    Raises:
        RecipeError: a metric does not fit the head.
    """
    kind = head.problem_type
    if kind == TOKEN:
        return _metrics_of_words(task, head)
    return _fitting(task.metric or _DEFAULTS[kind], _FITTING[kind], head.count, kind)


def _metrics_of_words(task: Task, head: HeadClasses) -> tuple[MetricName, ...]:
    """Return the metrics of a task that labels words: by entities, where its tags spell them."""
    metrics = task.metric or _DEFAULTS[TOKEN]
    if "seqeval_f1" in metrics and head.names is None:
        raise RecipeError(
            "the head does not name its tags, which metric seqeval_f1 goes by; name them in their "
            "order as head.classes, with head.from_expert: true, or give metric: accuracy"
        )
    if "seqeval_f1" in metrics and not spell_entities(head.names or ()):
        if task.metric is None:
            return ("accuracy", "macro_f1")
        raise RecipeError(
            f"metric seqeval_f1 is for tags like B-PER, I-PER and O, and the head's are "
            f"{listed(head.names or ())}; choose accuracy or macro_f1"
        )
    return _fitting(metrics, _FITTING[TOKEN], head.count, TOKEN)


def check_pairs(samples: Samples, metrics: Sequence[MetricName]) -> None:
    """Make sure that a task that embeds texts has pairs of them, and what its metrics need.

    Raises:
        RecipeError: it has not; other tasks are always right.
    """
    if not isinstance(samples, EmbeddingSamples):
        return
    where = f"task {samples.task!r}: {samples.source.path}"
    if len(samples.columns) < 2:
        raise RecipeError(
            f"{where}: embeddings are evaluated on pairs of texts; give input_columns, like "
            "[sentence1, sentence2]"
        )
    rated = set(metrics) - {"ndcg_at_10"}
    if samples.source.label_column is None and rated:
        raise RecipeError(
            f"{where}: metric {sorted(rated)[0]} needs a label_column with similarities; without "
            "one every pair counts as relevant, for metric ndcg_at_10"
        )
    if "ndcg_at_10" in metrics:
        relevance = samples.relevance()
        if min(relevance) < 0 or not any(relevance):
            raise RecipeError(
                f"{where}: relevances for metric ndcg_at_10 are 0 or more, and some above 0"
            )


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


@dataclass(frozen=True)
class WordPredictions(TaskPredictions):
    """Tags of words, ``[m]``, sample after sample.

    Attributes:
        sizes: words of each sample, ``[n]``; ``m`` together.
        tags: their names; empty where they have none.
    """

    sizes: Sequence[int] = ()
    tags: Sequence[str] = ()

    def labelled(self) -> "WordPredictions":
        """Return predictions for the words alone that have a label; the others do not count."""
        held = self.truth != IGNORED
        ends = np.cumsum(self.sizes)
        sizes = [
            int(held[end - size : end].sum()) for size, end in zip(self.sizes, ends, strict=True)
        ]
        predicted = {name: values[held] for name, values in self.predicted.items()}
        return replace(self, truth=self.truth[held], predicted=predicted, sizes=sizes)

    def _by(self, metric: MetricName, model: str) -> Score:
        if metric == "seqeval_f1":
            return EntityF1.of_tags(self.predicted[model], self.truth, self.sizes, self.tags)
        return super()._by(metric, model)


@dataclass(frozen=True)
class EmbeddingPredictions(TaskPredictions):
    """Embeddings of both texts of each pair, ``[2n, E]``; ``truth`` is ``[n]``.

    Attributes:
        pairs: the texts.
    """

    pairs: Sequence[tuple[str, str]] = ()

    def same(self, model: str, other: str) -> Booleans:
        """Return for which pairs two models' similarities are close, ``[n]``."""
        ours, theirs = (similarities(self.predicted[name]) for name in (model, other))
        return np.asarray(np.abs(ours - theirs) <= _SAME * float(theirs.std()))

    def recalls(self, model: str) -> list[float | None]:
        """Return nothing: embeddings have no classes."""
        return []

    def _by(self, metric: MetricName, model: str) -> Score:
        embeddings = self.predicted[model]
        if metric == "ndcg_at_10":
            return Ndcg.of_pairs(embeddings, self.pairs, self.truth)
        kind = RankCorrelation if metric == "spearmanr" else LinearCorrelation
        return kind(similarities(embeddings), self.truth)


# What of a batch's logits ``[n, C]`` is kept, and how it is scored.
KEPT: Mapping[ProblemType, Callable[[Predicted], Predicted]] = {
    SINGLE_LABEL: lambda logits: logits.argmax(axis=1),
    MULTI_LABEL: lambda logits: logits,
    REGRESSION: lambda logits: logits[:, 0],
    TOKEN: lambda logits: logits.argmax(axis=1),
    EMBEDDING: lambda embeddings: embeddings,
}
PREDICTIONS: Mapping[ProblemType, type[TaskPredictions]] = {
    SINGLE_LABEL: TaskPredictions,
    MULTI_LABEL: LabelSetPredictions,
    REGRESSION: ValuePredictions,
}
