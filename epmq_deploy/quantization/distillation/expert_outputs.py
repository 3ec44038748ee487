"""What experts give for the batches of one epoch, and how far the student is from that."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epmq_deploy.data.accuracy import embeddings
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.predictions import PredictedLogits, predict_logits
from epmq_deploy.models.problem_types import divergence

_TEMPERATURE = 2.0


@dataclass(frozen=True)
class ExpertOutputs:
    """What an expert gives for one batch, on the CPU.

    Attributes:
        predicted: logits.
        features: what its head takes, ``[m, D]``; None where the student's are not compared.
    """

    predicted: PredictedLogits
    features: Tensor | None = None


def expert_outputs(
    model: nn.Module,
    family: ModelFamily,
    head: TaskHead | None,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    compares_features: bool,
) -> list[ExpertOutputs]:
    """Return what an expert gives for each batch.

    Args:
        model: the expert's backbone.
        family: its family.
        head: that the expert predicts through; None where the family generates text.
        batches: model inputs.
        compares_features: whether the student is to have the expert's features, too: those of one
            head are the same for both.
    """
    outputs = []
    for inputs in batches:
        features = embeddings(model, family, inputs).to(torch.float32)
        predicted = predict_logits(family, head, features, inputs)
        compared = compares_features and head is not None and features.dim() == 2
        outputs.append(ExpertOutputs(predicted, features if compared else None))
    return outputs


def distillation_loss(
    predicted: PredictedLogits, features: Tensor, expert: ExpertOutputs
) -> Tensor:
    """Return the mean over samples of the divergence from an expert, as a scalar.

    The divergence of predictions softened by a temperature of 2, times its square (Hinton et al.,
    arXiv 1503.02531); and, where features are compared, 1 less the cosine of their angle.

    Args:
        predicted: by the student.
        features: the student's, ``[m, D]``.
        expert: what its expert gives.
    """
    softened = divergence(
        predicted.logits / _TEMPERATURE,
        expert.predicted.logits / _TEMPERATURE,
        predicted.problem_type,
    )
    losses = softened * _TEMPERATURE**2
    if expert.features is not None:
        losses = losses + 1 - F.cosine_similarity(features, expert.features, dim=1)
    return predicted.per_sample(losses).mean()
