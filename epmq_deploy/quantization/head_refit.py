"""Re-fitting classifiers to the deployed model's embeddings, towards the experts' predictions.

A task's head was trained on its expert's embeddings; those of the merged model differ from them,
for every task in its own way. The last linear layer of each head is fitted anew, a convex problem
with the calibration samples' embeddings as inputs and the expert's softened predictions as targets
(Hinton et al., arXiv 1503.02531), held by a ridge to the head as it was. Correcting each task's
representation after merging is the idea of representation surgery (Yang et al., arXiv 2402.02705);
a re-fitted head costs nothing at run time.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epmq_deploy.data.accuracy import embeddings
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.models import ModelFamily
from epmq_deploy.models.embedding_head import EmbeddingHead
from epmq_deploy.models.head import TaskHead
from epmq_deploy.models.predictions import PredictedLogits, predict_logits
from epmq_deploy.models.problem_types import REGRESSION, divergence
from epmq_deploy.recipe import ProblemType

_TEMPERATURE = 2.0
# Of L-BFGS at most; it stops when nothing changes any more.
STEPS = 100
_BATCH = 64


def can_be_refitted(head: TaskHead) -> bool:
    """Whether a head ends in a linear classifier; heads that embed texts do not."""
    return not isinstance(head, EmbeddingHead)


def refit_head(
    head: TaskHead, inputs: Tensor, expert_logits: Tensor, pull: float, steps: int = STEPS
) -> TaskHead:
    """Return a head whose classifier is fitted to the expert's predictions.

    Args:
        head: of the task; left as it is.
        inputs: of its classifier, ``[m, P]``.
        expert_logits: what the expert predicts, ``[m, C]``.
        pull: towards the head as it was, positive; see ``fit_classifier``.
        steps: of the solver at most.
    """
    weight, bias = fit_classifier(
        inputs,
        expert_logits,
        head.weight,
        head.bias,
        pull=pull,
        kind=head.problem_type,
        steps=steps,
    )
    tensors = {**head.state_dict(), "weight": weight, "bias": bias}
    return TaskHead.of_tensors(tensors, head.activation, head.problem_type, head.norm_epsilon)


def fit_classifier(
    inputs: Tensor,
    expert_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    pull: float,
    kind: ProblemType,
    steps: int = STEPS,
) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier to an expert's predictions.

    Minimises the mean divergence from the expert's softened predictions, plus ``pull`` times the
    mean square by which the logits of random inputs, as large as the given ones, change. The
    problem is convex; it is solved in float64 by L-BFGS, in coordinates in which a quadratic bound
    of the loss (Böhning, 1992) is round, which takes far fewer steps.

    Args:
        inputs: ``[m, P]``.
        expert_logits: ``[m, C]``.
        weight: the classifier as it was, ``[C, P]``.
        bias: likewise ``[C]``; None starts from zeros.
        pull: towards the classifier as it was, positive.
        kind: what logits mean.
        steps: of the solver at most.

    Returns:
        Weight ``[C, P]`` and bias ``[C]``, float32.
    """
    x, target = inputs.detach().to(torch.float64), expert_logits.detach().to(torch.float64)
    start = weight.detach().to(torch.float64)
    offset = start.new_zeros(len(start)) if bias is None else bias.detach().to(torch.float64)
    temperature = 1.0 if kind == REGRESSION else _TEMPERATURE
    hold = pull / len(start)
    power = x.square().mean()
    bound = 0.25 * x.T @ x / len(x)
    bound.diagonal().add_(hold * power)
    root = torch.linalg.cholesky(bound)
    change = torch.zeros_like(start, requires_grad=True)
    shift = torch.zeros_like(offset, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change, shift], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def moves() -> Tensor:
        moved: Tensor = torch.linalg.solve_triangular(root.T, change.T, upper=True).T
        return moved

    def loss() -> Tensor:
        optimizer.zero_grad()
        moved = moves()
        logits = x @ (start + moved).T + offset + shift
        away = divergence(logits / temperature, target / temperature, kind).mean()
        ridge = power * moved.square().sum() + shift.square().sum()
        total: Tensor = temperature**2 * away + hold * ridge
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (start + moves()).detach().float(), (offset + shift).detach().float()


@dataclass(frozen=True)
class ClassifierInputs:
    """What a task's classifier takes of a model's embeddings, on the CPU.

    Attributes:
        rows: ``[m, P]``; embeddings themselves where the head has no classifier.
        counts: how many rows belong to each sample, ``[n]``, int64.
    """

    rows: Tensor
    counts: Tensor

    def part(self, start: int, stop: int) -> "ClassifierInputs":
        """Return those of samples ``start`` to ``stop``."""
        first, last = (int(self.counts[:end].sum()) for end in (start, stop))
        return ClassifierInputs(self.rows[first:last], self.counts[start:stop])

    def predicted(self, head: TaskHead) -> PredictedLogits:
        """Return what a head, with a classifier as wide as these, predicts."""
        logits = self.rows
        if can_be_refitted(head):
            logits = F.linear(logits, head.weight, head.bias)
        return PredictedLogits(logits, self.counts, head.problem_type)


def classifier_inputs(
    model: nn.Module, family: ModelFamily, folder: Path, samples: Samples, head: TaskHead
) -> ClassifierInputs:
    """Return what a head's classifier takes of a model's embeddings of samples.

    Args:
        model: a backbone of ``family``.
        family: embeds and preprocesses.
        folder: a model folder with preprocessor settings.
        samples: of the task.
        head: of the task, on the CPU.
    """
    rows, counts = [], []
    for inputs in batches(samples, family, folder, _BATCH):
        embedding = embeddings(model, family, inputs)
        with torch.no_grad():
            taken = head.classifier_inputs(embedding) if can_be_refitted(head) else head(embedding)
        rows.append(taken.clone())
        counts.append(predict_logits(family, head, embedding, inputs).counts)
    return ClassifierInputs(torch.cat(rows), torch.cat(counts))
