"""Fisher merging (Matena and Raffel, arXiv 2111.09832): means weighted by the diagonal Fisher.

As in the authors' code, each expert's Fisher is divided by its norm over all parameters and floored
at 1e-6; the number of samples is FusionBench's for CLIP (``clip_fisher_merging.yaml``).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import (
    Calibrated,
    CalibrationData,
    Context,
    FromData,
    MergeMethod,
    TaskVectors,
)
from epmq_deploy.merging.task_weights import WeightedOptions, weight_column, weight_problems
from epmq_deploy.options.merging import DataOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from epmq_deploy.checkpoints.tensors import StoredTensor
    from epmq_deploy.models.predictions import PredictedLogits


class FisherOptions(DataOptions, WeightedOptions):
    """Fisher merging."""

    method: Literal["fisher"] = "fisher"
    labels: int = Field(
        1,
        ge=0,
        description="labels drawn per sample from the expert's predicted distribution; 0 computes "
        "the exact expectation instead, with one backward pass per class",
    )
    floor: float = Field(
        1e-6, gt=0, description="lower bound of squared gradients, against division by zero"
    )

    whole_model: ClassVar[frozenset[str]] = DataOptions.whole_model | {"labels"}


@dataclass(frozen=True)
class Fishers:
    """The experts' diagonal Fishers, on disk.

    Attributes:
        folder: deleted with this object.
        tensors: per task, tensor name to mean squared gradient.
        norms: per task, over all parameters.
    """

    folder: tempfile.TemporaryDirectory[str]
    tensors: Sequence[Mapping[str, StoredTensor]]
    norms: Sequence[float]

    def of_tensor(self, name: str, like: Tensor) -> Tensor:
        """Read the Fishers ``[T, *]`` of one tensor; zero where the model has no such parameter."""
        fishers = [
            held[name].load().to(like.device) if name in held else torch.zeros_like(like)
            for held in self.tensors
        ]
        return torch.stack(fishers)


def fisher_mean(task_vectors: Tensor, fishers: Tensor, scales: Tensor, floor: float) -> Tensor:
    """Compute ``sum_t s_t F_t tau_t / sum_t s_t F_t``, elementwise.

    Args:
        task_vectors: ``[T, *]``.
        fishers: ``[T, *]``, floored at ``floor``.
        scales: of each task, ``[T, 1, ...]``.
        floor: least Fisher.
    """
    weights = scales * fishers.clamp(min=floor)
    return (weights * task_vectors).sum(dim=0) / weights.sum(dim=0)


def diagonal_fisher(
    model: nn.Module,
    predict: Callable[[tuple[Tensor, ...]], PredictedLogits],
    samples: Sequence[tuple[Tensor, ...]],
    labels: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Compute an expert's diagonal Fisher, by parameter.

    It is the mean over samples ``x`` of ``E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2``. Where a
    sample has several predictions (the tokens of an answer), ``log p(y|x)`` is their sum, with one
    label for each.

    Args:
        model: an expert.
        predict: returns its predictions for one sample's inputs, ``[m, C]``.
        samples: model inputs, one sample each.
        labels: draws of ``y`` per sample; 0 for the exact expectation.
        generator: CPU, of the draws.
    """
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    model.requires_grad_(True)
    try:
        for inputs in samples:
            weighted = _weighted_likelihoods(predict(inputs), labels, generator)
            for number, (likelihood, weight) in enumerate(weighted, start=1):
                gradients = torch.autograd.grad(
                    likelihood,
                    list(parameters.values()),
                    retain_graph=number < len(weighted),
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name].addcmul_(gradient, gradient, value=weight / len(samples))
    finally:
        model.requires_grad_(False)
    return total


def _weighted_likelihoods(
    predicted: PredictedLogits, labels: int, generator: torch.Generator
) -> list[tuple[Tensor, float]]:
    """Return log-likelihoods whose squared gradients, weighted, add up to a sample's Fisher.

    The exact expectation sums over predictions too, which are independent given the inputs. A value
    is the mean of a Gaussian of variance 1, whose Fisher is the square of the value's gradient; so
    is each of an embedding.
    """
    from epmq_deploy.models.problem_types import EMBEDDING, WITHOUT_CLASSES, log_chances

    if predicted.problem_type == EMBEDDING and labels:
        # The squared gradient along a random direction is that of all values, in expectation.
        shape = (labels, *predicted.logits.shape)
        directions = torch.randn(shape, generator=generator).to(predicted.logits)
        return [((predicted.logits * along).sum(), 1 / labels) for along in directions]
    if predicted.problem_type in WITHOUT_CLASSES:
        return [(value, 1.0) for value in predicted.logits.flatten()]
    scores = log_chances(predicted.logits, predicted.problem_type).flatten(0, -2)
    chances = scores.detach().exp().cpu()
    if labels:
        drawn = torch.multinomial(chances, labels, replacement=True, generator=generator)
        columns = drawn.to(scores.device).T
        return [(scores.gather(1, column[:, None]).sum(), 1 / labels) for column in columns]
    return [
        (scores[row, label], float(chance))
        for row, of_row in enumerate(chances)
        for label, chance in enumerate(of_row)
    ]


def collect(
    data: CalibrationData, vectors: TaskVectors, options: FisherOptions
) -> Calibrated[Fishers]:
    """Compute every expert's diagonal Fisher; one expert is in memory at a time."""
    from safetensors.torch import save_file

    from epmq_deploy.checkpoints.tensors import stored_tensors

    folder = tempfile.TemporaryDirectory(prefix="epmq-fisher-")
    tensors, norms = [], []
    for task in data.progress.track(data.tasks, "squared gradients"):
        expert = data.experts.become(task)
        fisher = diagonal_fisher(
            expert,
            partial(data.predictions, task, expert),
            list(data.batches(task, 1)),
            options.labels,
            torch.Generator().manual_seed(options.seed),
        )
        norms.append(
            math.sqrt(sum(float(value.double().square().sum()) for value in fisher.values()))
        )
        file = Path(folder.name) / f"{task}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in fisher.items()}, file)
        tensors.append(stored_tensors([file]))
    return Calibrated(
        Fishers(folder, tensors, norms), {"fisher_norms": dict(zip(data.tasks, norms, strict=True))}
    )


def merge(
    base: Tensor, task_vectors: Tensor, options: FisherOptions, context: Context[Fishers]
) -> Tensor:
    """Add the Fisher-weighted mean of ``task_vectors [T, *]`` to ``base [*]``."""
    norms = base.new_tensor([max(norm, options.floor) for norm in context.statistics.norms])
    scales = weight_column(options, context.tasks, task_vectors)
    scales = scales / norms.reshape_as(scales)
    fishers = context.statistics.of_tensor(context.name, base)
    return base + fisher_mean(task_vectors, fishers, scales / scales.sum(), options.floor)


METHOD = MergeMethod(
    options=FisherOptions,
    summary="mean weighted by squared gradients of the experts' predictions (needs data)",
    source="Fisher merging, arXiv 2111.09832",
    merge=merge,
    statistics=FromData(collect, needs_heads=True),
    check=weight_problems,
)
