"""One figure for any head: percent of classes that are right, or the rank correlation of values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from epmq_deploy.data.accuracy import embeddings
from epmq_deploy.data.heads import head_classes
from epmq_deploy.data.samples import Samples
from epmq_deploy.data.targets import targets_of
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.recipe import Recipe


def score(logits: Tensor, truth: Tensor) -> float:
    """Return the percentage of right classes, or Spearman's rank correlation of values times 100.

    Args:
        logits: ``[n, C]``; of values ``[n, 1]``.
        truth: class numbers int64 ``[n]``, or values, floating point ``[n]``.
    """
    if truth.is_floating_point():
        return 100.0 * float(spearmanr(logits[:, 0].numpy(), truth.numpy()).statistic)
    return 100.0 * float((logits.argmax(dim=1) == truth).float().mean())


def standard_error(score: float, samples: int, *, values: bool) -> float:
    """Return the standard error of a score over test samples, in points.

    Of values it is Fieller's for rank correlations: that of the Fisher transform is
    ``sqrt(1.06 / (n - 3))``.
    """
    share = score / 100
    if values:
        return 100.0 * float((1.06 / (samples - 3)) ** 0.5 * (1 - share**2))
    return 100.0 * float((share * (1 - share) / samples) ** 0.5)


def model_score(
    model: nn.Module,
    family: ModelFamily,
    head: TaskHead,
    batches: Iterable[tuple[Tensor, ...]],
    truth: Tensor,
) -> float:
    """Score a backbone with a task's head on batches of inputs, in the order of ``truth``."""
    logits = [head(embeddings(model, family, inputs)) for inputs in batches]
    return score(torch.cat(logits).detach(), truth)


def truth_of(recipe: Recipe, samples: Samples, heads: dict[str, TaskHead]) -> Tensor:
    """Return what a task's head should predict: class numbers int64, or values, ``[n]``."""
    task = samples.task
    return torch.from_numpy(
        targets_of(samples, head_classes(recipe.tasks[task], heads[task])).values
    )
