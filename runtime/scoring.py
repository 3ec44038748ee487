"""Predictions of all models on a task, whatever the kind of task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from epmq_deploy.experts import ExpertBackbone
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.runtime.report import EXPERTS
from epmq_deploy.runtime.sessions import Graph
from epmq_deploy.runtime.significance import Booleans
from epmq_deploy.tasks.accuracy import embeddings
from epmq_deploy.tasks.data import Samples, batches

Predicted = npt.NDArray[Any]


@dataclass(frozen=True)
class Predictions:
    """What every model predicts for the samples of one task.

    Attributes:
        truth: ``[n]``, of any type that ``==`` compares (class numbers, texts).
        predicted: by model name, likewise.
    """

    truth: Predicted
    predicted: Mapping[str, Predicted]

    def correct(self, model: str) -> Booleans:
        """Which samples a model predicts correctly, ``[n]``."""
        return np.asarray(self.predicted[model] == self.truth, dtype=np.bool_)

    def same(self, model: str, other: str) -> Booleans:
        """For which samples two models predict the same, ``[n]``."""
        return np.asarray(self.predicted[model] == self.predicted[other], dtype=np.bool_)


class Scorer(Protocol):
    """Runs all models on a task; one class per kind of task."""

    def predict(self, task: str, samples: Samples) -> Predictions:
        """Predictions of every graph and, where evaluated, of the task's expert."""


@dataclass(frozen=True)
class ClassScorer:
    """Classification: the class of the largest logit. Each sample is decoded once.

    Attributes:
        family: of the model.
        folder: of the export, for preprocessing.
        batch_size: samples per run.
        graphs: by model name.
        heads: by task, for the experts.
        experts: in torch, or None.
    """

    family: ModelFamily
    folder: Path
    batch_size: int
    graphs: Mapping[str, Graph]
    heads: Mapping[str, TaskHead] = field(default_factory=dict)
    experts: ExpertBackbone | None = None

    def predict(self, task: str, samples: Samples) -> Predictions:
        """See base."""
        expert = self.experts.become(task) if self.experts else None
        names = [*([EXPERTS] if expert else []), *self.graphs]
        classes: dict[str, list[Predicted]] = {name: [] for name in names}
        output = f"logits_{task}"
        for batch in batches(samples, self.family, self.folder, self.batch_size):
            for name, graph in self.graphs.items():
                classes[name].append(graph.run(batch, [output])[output].argmax(axis=1))
            if expert is not None:
                logits = self.heads[task](embeddings(expert, self.family, batch))
                classes[EXPERTS].append(logits.argmax(dim=1).numpy())
        predicted = {name: np.concatenate(parts) for name, parts in classes.items()}
        return Predictions(samples.labels().numpy(), predicted)
