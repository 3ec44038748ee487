"""Accuracy of a torch model on one task."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.predictions import features_of
from epmq_deploy.models.token_batch import on_device


def count_hits(logits: Tensor, labels: Tensor) -> int:
    """Count samples whose largest logit is their label; ``logits [n, C]``, ``labels [n]`` int64."""
    return int((logits.argmax(dim=1) == labels).sum())


def torch_accuracy(
    model: nn.Module,
    family: ModelFamily,
    head: TaskHead,
    batches: Iterable[tuple[Tensor, ...]],
    labels: Tensor,
) -> float:
    """Return the percentage of correct predictions.

    Args:
        model: a backbone of ``family``.
        family: embeds the inputs.
        head: the task's.
        batches: model inputs, in the order of ``labels``.
        labels: int64 ``[n]``.
    """
    hits = start = 0
    for inputs in batches:
        features = embeddings(model, family, inputs)
        stop = start + len(features)
        hits += count_hits(head(features), labels[start:stop])
        start = stop
    return 100.0 * hits / len(labels)


def embeddings(model: nn.Module, family: ModelFamily, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return what heads take of one batch, computed where the model is, returned on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return features_of(family, model, on_device(inputs, device)).cpu()
