"""Running all models on a task, whatever the kind of task."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from epmq_deploy.artifacts.manifest import GraphEntry
from epmq_deploy.data.accuracy import embeddings
from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.samples import EmbeddingSamples, Samples, batches
from epmq_deploy.data.targets import of_words_read, targets_of
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.deployable import output_of
from epmq_deploy.models.experts import ExpertBackbone
from epmq_deploy.models.problem_types import TOKEN
from epmq_deploy.models.text_generation.special_tokens import SpecialTokens
from epmq_deploy.models.token_batch import WordBatch, words_read
from epmq_deploy.recipe import MetricName
from epmq_deploy.runtime.evaluation.latency import Runs
from epmq_deploy.runtime.evaluation.predictions import (
    KEPT,
    PREDICTIONS,
    EmbeddingPredictions,
    Predicted,
    TaskPredictions,
    WordPredictions,
)
from epmq_deploy.runtime.evaluation.report import EXPERTS
from epmq_deploy.runtime.ort.sessions import Graph

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Runs)
Family = TypeVar("Family", bound=ModelFamily)


@dataclass(frozen=True)
class Scorer(ABC, Generic[Model, Family]):
    """How models of one kind of task are opened, fed and scored; ``Model`` is one format's.

    Attributes:
        family: of the model.
        folder: of the export.
        entries: what its manifest says of each graph.
        provider: of onnxruntime.
        batch_size: samples per run.
    """

    family: Family
    folder: Path
    entries: Sequence[GraphEntry]
    provider: str
    batch_size: int

    @property
    def special_tokens(self) -> SpecialTokens | None:
        """Ids that steer writing; None where a batch is what a format's only graph takes."""
        return None

    @abstractmethod
    def open(self, threads: int | None) -> Mapping[str, Model]:
        """Every format of the export, ready to run with that many threads."""

    @abstractmethod
    def predict(self, models: Mapping[str, Model], task: str, samples: Samples) -> TaskPredictions:
        """Predictions of these models and, where evaluated, of the task's expert."""

    @abstractmethod
    def batch(self, samples: Samples, start: int, size: int) -> tuple[Tensor, ...]:
        """Return model inputs: samples from ``start`` on, and again from the first at the end."""


def raw_samples(samples: Samples, start: int, size: int) -> list[Any]:
    """Return inputs from ``start`` on, and again from the first at their end."""
    rows = [index % len(samples) for index in range(start, start + size)]
    return [samples.inputs(row, row + 1)[0] for row in rows]


@dataclass(frozen=True)
class ClassScorer(Scorer[Graph, ModelFamily]):
    """Models that predict through heads.

    Attributes:
        heads: by task, for the experts.
        classes: of the heads, by task.
        metrics: by task.
        experts: in torch, or None.
    """

    heads: Mapping[str, TaskHead] = field(default_factory=dict)
    classes: Mapping[str, HeadClasses] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[MetricName]] = field(default_factory=dict)
    experts: ExpertBackbone | None = None

    def open(self, threads: int | None) -> Mapping[str, Graph]:
        """Open every format."""
        return {
            entry.format: Graph.exported(
                self.folder, entry, provider=self.provider, threads=threads
            )
            for entry in self.entries
        }

    def predict(self, models: Mapping[str, Graph], task: str, samples: Samples) -> TaskPredictions:
        """Return predictions; each sample is decoded once."""
        expert = self.experts.become(task) if self.experts else None
        names = [*([EXPERTS] if expert else []), *models]
        head = self.classes[task]
        kept = KEPT[head.problem_type]
        parts: dict[str, list[Predicted]] = {name: [] for name in names}
        words: list[Tensor] = []
        output = output_of(task, head.problem_type)
        for batch in batches(samples, self.family, self.folder, self.batch_size):
            words += words_read(batch)
            for name, graph in models.items():
                logits = graph.run(batch, [output], task=task)[output]
                if isinstance(batch, WordBatch):
                    logits = logits[(batch.words >= 0).numpy()]
                parts[name].append(kept(logits))
            if expert is not None:
                of_expert = self.heads[task](embeddings(expert, self.family, batch))
                parts[EXPERTS].append(kept(of_expert.numpy()))
        targets = targets_of(samples, head)
        predicted = {name: np.concatenate(values) for name, values in parts.items()}
        metrics, count = self.metrics[task], head.count or 0
        if isinstance(samples, EmbeddingSamples):
            pairs = samples.pairs()
            return EmbeddingPredictions(targets.values, predicted, metrics, pairs=pairs)
        if head.problem_type != TOKEN:
            return PREDICTIONS[head.problem_type](targets.values, predicted, metrics, count)
        sizes = [len(numbers) for numbers in words]
        if cut := sum(map(len, targets.values)) - sum(sizes):
            log.warning(
                "task %r: %d words are beyond what the model reads and do not count", task, cut
            )
        truth = of_words_read(targets, words)
        tags = head.names or ()
        return WordPredictions(truth, predicted, metrics, count, sizes, tags).labelled()

    def batch(self, samples: Samples, start: int, size: int) -> tuple[Tensor, ...]:
        """Return a batch of samples."""
        folder = samples.inputs_folder or self.folder
        return self.family.collate(folder, raw_samples(samples, start, size))
