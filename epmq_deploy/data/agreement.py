"""How closely a model predicts what the experts predict; needs no labels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_deploy.data.accuracy import embeddings
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.predictions import PredictedLogits, predict_logits
from epmq_deploy.models.problem_types import divergence

# A loss (as divergence from the expert) of each task's samples, ``[n]``.
Scores = Mapping[str, Tensor]
_BATCH = 64


def standard_error(first: Scores, second: Scores) -> float:
    """Return the standard error of the difference of two means over tasks, samples paired."""
    variance = 0.0
    for task, values in first.items():
        difference = values - second[task]
        if len(difference) > 1:
            variance += float(difference.var()) / len(difference)
    return math.sqrt(variance) / max(len(first), 1)


def mean_divergence(scores: Scores) -> float:
    """Average over tasks the mean over samples."""
    return sum(float(values.mean()) for values in scores.values()) / max(len(scores), 1)


def predictions_of(
    model: nn.Module, family: ModelFamily, folder: Path, samples: Samples, head: TaskHead | None
) -> PredictedLogits:
    """Predict the logits of all samples of a task, on the CPU.

    Args:
        model: a backbone of ``family``.
        family: embeds and preprocesses.
        folder: a model folder with preprocessor settings.
        samples: of the task.
        head: of the task, on the CPU; None where the family generates text.
    """
    found = [
        predict_logits(family, head, embeddings(model, family, inputs), inputs)
        for inputs in batches(samples, family, folder, _BATCH)
    ]
    return PredictedLogits(
        torch.cat([part.logits for part in found]),
        torch.cat([part.counts for part in found]),
        found[0].problem_type,
    )


def scored(
    model: nn.Module,
    family: ModelFamily,
    folder: Path,
    samples: Mapping[str, Samples],
    heads: Mapping[str, TaskHead],
    loss: Callable[[str, PredictedLogits], Tensor],
) -> Scores:
    """Return the losses of a model's predictions: each sample's mean, by task ``[n]``.

    Args:
        model: a backbone of ``family``.
        family: embeds and preprocesses.
        folder: a model folder with preprocessor settings.
        samples: by task.
        heads: by task; none where models generate text.
        loss: of each prediction ``[m]``, given the task and its predictions.
    """
    found = {}
    for task, chosen in samples.items():
        predicted = predictions_of(model, family, folder, chosen, heads.get(task))
        found[task] = predicted.per_sample(loss(task, predicted))
    return found


@dataclass(frozen=True)
class Judge:
    """Scores models by how closely they predict what the experts predict.

    Attributes:
        family: embeds and preprocesses.
        folder: a model folder with preprocessor settings.
        samples: by task.
        heads: by task; none where models generate text.
        wanted: what experts predict for their own task's samples; in memory, float32.
    """

    family: ModelFamily
    folder: Path
    samples: Mapping[str, Samples]
    heads: Mapping[str, TaskHead]
    wanted: Mapping[str, PredictedLogits]

    @classmethod
    def of_experts(
        cls,
        family: ModelFamily,
        folder: Path,
        samples: Mapping[str, Samples],
        heads: Mapping[str, TaskHead],
        expert: Callable[[str], nn.Module],
        expert_heads: Mapping[str, TaskHead],
    ) -> "Judge":
        """Return a judge that compares with the experts' predictions.

        Args:
            family: embeds and preprocesses.
            folder: a model folder with preprocessor settings.
            samples: by task.
            heads: by task; none where models generate text.
            expert: returns the backbone of a task's expert, valid until the next call.
            expert_heads: the heads experts predict through, by task.
        """
        wanted = {
            task: predictions_of(expert(task), family, folder, chosen, expert_heads.get(task))
            for task, chosen in samples.items()
        }
        return cls(family, folder, samples, heads, wanted)

    def scores(self, model: nn.Module) -> Scores:
        """Return divergences from the experts, by task ``[n]``."""

        def loss(task: str, predicted: PredictedLogits) -> Tensor:
            return divergence(predicted.logits, self.wanted[task].logits, predicted.problem_type)

        return scored(model, self.family, self.folder, self.samples, self.heads, loss)


@dataclass(frozen=True)
class Tuned:
    """The result of tuning a strength.

    Attributes:
        value: the strength chosen.
        curve: mean divergence from the experts by strength tried, ascending.
        standard_error: of the difference between the best and the starting strength.
    """

    value: float
    curve: dict[float, float]
    standard_error: float


def tune(
    score: Callable[[float], Scores],
    start: float,
    *,
    factor: float,
    steps: int,
    finer: bool = False,
) -> Tuned:
    """Walk from ``start`` in equal factors as long as the divergence falls.

    A strength other than ``start`` is chosen only when it is better by more than one standard
    error of the paired difference, so that noise does not decide.

    Args:
        score: divergence from the experts, sample by sample, for a strength.
        start: strength to begin with, positive.
        factor: between neighbouring strengths.
        steps: most steps in each direction.
        finer: try half a step to either side of the best at the end.
    """
    found = {start: score(start)}
    for direction in (factor, 1 / factor):
        last = start
        for _ in range(steps):
            candidate = last * direction
            found[candidate] = score(candidate)
            if mean_divergence(found[candidate]) >= mean_divergence(found[last]):
                break
            last = candidate
    best = _best(found)
    if finer:
        for candidate in (best * math.sqrt(factor), best / math.sqrt(factor)):
            found[candidate] = score(candidate)
        best = _best(found)
    error = standard_error(found[best], found[start])
    better = mean_divergence(found[start]) - mean_divergence(found[best]) > error
    curve = {strength: mean_divergence(found[strength]) for strength in sorted(found)}
    return Tuned(best if better else start, curve, error)


def _best(found: Mapping[float, Scores]) -> float:
    return min(found, key=lambda strength: mean_divergence(found[strength]))
