"""Predicted logits of any model, the input of divergences, entropies and likelihoods.

A classifier predicts one class per sample, or one per word, through the task's head. A
text-generation model predicts every token of the answer, through its output layer, after reading
the tokens of the sample's answer before it ("teacher forcing"): several predictions per sample,
none for padding.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.problem_types import SINGLE_LABEL
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.models.token_batch import TokenBatch
from epmq_deploy.recipe import ProblemType


@dataclass(frozen=True)
class PredictedLogits:
    """Predicted logits of ``n`` samples.

    Attributes:
        logits: ``[m, C]``, float32, those of a sample in a row.
        counts: how many belong to each sample, ``[n]``, int64; ``m`` together.
        problem_type: what the logits mean.
    """

    logits: Tensor
    counts: Tensor
    problem_type: ProblemType = SINGLE_LABEL

    def per_sample(self, values: Tensor) -> Tensor:
        """Average ``values [m]`` over each sample's predictions, ``[n]``; 0 where it has none."""
        counts = self.counts.to(values.device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
        sums = values.new_zeros(len(counts)).index_add(0, owners, values)
        return sums / counts.clamp(min=1)

    def of_samples(self, start: int, stop: int) -> "PredictedLogits":
        """Return the logits of samples ``start`` to ``stop``."""
        first, last = (int(self.counts[:end].sum()) for end in (start, stop))
        return replace(self, logits=self.logits[first:last], counts=self.counts[start:stop])


def features_of(family: ModelFamily, model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Compute what a task's head takes: embeddings ``[n, D]``; of words, ``[m, D]``.

    Args:
        family: the model's.
        model: a backbone of the family.
        inputs: of the task, on the model's device.
    """
    if isinstance(inputs, TokenBatch):
        return inputs.features(family.token_states(model, *inputs))
    return family.embed(model, *inputs)


def predict_logits(
    family: ModelFamily, head: TaskHead | None, features: Tensor, inputs: tuple[Tensor, ...]
) -> PredictedLogits:
    """Predict the logits of one batch; differentiable.

    Args:
        family: the model's.
        head: of the task, on the device of ``features``; None where the family generates text.
        features: as ``features_of`` returns them, float32.
        inputs: of the model, as ``family.input_names``.
    """
    assert generates_text(family) or head is not None, "classifiers predict through heads"
    counts = family.prediction_counts(*inputs)
    if isinstance(inputs, TokenBatch):
        counts = inputs.counts()
    if head is None:
        return PredictedLogits(features, counts)
    return PredictedLogits(head(features), counts, head.problem_type)
