"""What models predict, whatever their kind; divergences, entropies and likelihoods are taken of it.

A classifier predicts a class once a sample, through the task's head. A model that writes texts
predicts the next token wherever one of the answer is due, through its own output layer, after
reading what comes before it in the sample's answer ("teacher forcing"): several predictions a
sample, of which padding is none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.text_generation.base import generates_text


@dataclass(frozen=True)
class PredictedLogits:
    """Of ``n`` samples.

    Attributes:
        logits: ``[m, C]``, float32, those of a sample in a row.
        counts: how many belong to each sample, ``[n]``, int64; ``m`` together.
    """

    logits: Tensor
    counts: Tensor

    def per_sample(self, values: Tensor) -> Tensor:
        """Means ``[n]`` over each sample's predictions of ``values [m]``; 0 where it has none."""
        counts = self.counts.to(values.device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
        sums = values.new_zeros(len(counts)).index_add(0, owners, values)
        return sums / counts.clamp(min=1)

    def of_samples(self, start: int, stop: int) -> "PredictedLogits":
        """Those of samples ``start`` to ``stop``."""
        first, last = (int(self.counts[:end].sum()) for end in (start, stop))
        return PredictedLogits(self.logits[first:last], self.counts[start:stop])


def entropy(logits: Tensor) -> Tensor:
    """Entropy of predictions ``[m]``, in nats, from logits ``[m, C]``."""
    scores = logits.log_softmax(dim=1)
    return -(scores.exp() * scores).sum(dim=1)


def predict_logits(
    family: ModelFamily, head: TaskHead | None, features: Tensor, inputs: tuple[Tensor, ...]
) -> PredictedLogits:
    """What a model predicts for one batch; differentiable.

    Args:
        family: the model's.
        head: of the task, where ``features`` are; None where the family writes texts.
        features: what ``family.embed`` gave, float32.
        inputs: of the model, as ``family.input_names``.
    """
    assert generates_text(family) or head is not None, "classifiers predict through heads"
    logits = features if head is None else head(features)
    return PredictedLogits(logits, family.prediction_counts(*inputs))
