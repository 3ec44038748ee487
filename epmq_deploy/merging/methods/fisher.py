"""Fisher merging (Matena and Raffel, arXiv 2111.09832): means weighted by the diagonal Fisher.

As in the authors' code, each expert's Fisher is divided by its norm over all parameters and floored
at 1e-6; the number of samples is FusionBench's for CLIP (``clip_fisher_merging.yaml``).
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from epmq_deploy.merging.calibrated import Calibrated, CalibrationData
from epmq_deploy.merging.method import Context, DataOptions, MergeMethod, TaskVectors
from epmq_deploy.merging.task_weights import WeightedOptions, weight_column, weight_problems
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.tensors import StoredTensor, stored_tensors


class FisherOptions(DataOptions, WeightedOptions):
    """Fisher merging."""

    method: Literal["fisher"] = "fisher"
    labels: int = Field(
        1,
        ge=0,
        description="labels drawn from the expert's own prediction per sample; 0 takes the "
        "expectation over all classes, at one backward pass for each",
    )
    floor: float = Field(1e-6, gt=0, description="least squared gradient, against division by zero")

    whole_model: ClassVar[frozenset[str]] = DataOptions.whole_model | {"labels"}


@dataclass(frozen=True)
class Fishers:
    """The experts' diagonal Fishers, on disk.

    Attributes:
        folder: is deleted with this object.
        tensors: per task, tensor name to mean squared gradient.
        norms: per task, over all parameters.
    """

    folder: "tempfile.TemporaryDirectory[str]"
    tensors: Sequence[Mapping[str, StoredTensor]]
    norms: Sequence[float]

    def of_tensor(self, name: str, like: Tensor) -> Tensor:
        """Fishers ``[T, *]`` of one tensor; zero where the model has no such parameter."""
        found = [
            held[name].load().to(like.device) if name in held else torch.zeros_like(like)
            for held in self.tensors
        ]
        return torch.stack(found)


def fisher_mean(task_vectors: Tensor, fishers: Tensor, scales: Tensor, floor: float) -> Tensor:
    """``sum_t s_t F_t tau_t / sum_t s_t F_t``, elementwise.

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
    family: ModelFamily,
    head: TaskHead,
    samples: Sequence[tuple[Tensor, ...]],
    labels: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Mean over samples ``x`` of ``E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2``, by parameter.

    Args:
        model: a backbone of ``family``.
        family: embeds the inputs.
        head: the task's.
        samples: model inputs, one sample each.
        labels: draws of ``y`` per sample; 0 for the exact expectation.
        generator: CPU, of the draws.
    """
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    model.requires_grad_(True)
    try:
        for inputs in samples:
            scores = head(family.embed(model, *inputs))[0].log_softmax(dim=0)
            chances = scores.detach().exp()
            if labels:
                drawn = torch.multinomial(
                    chances.cpu(), labels, replacement=True, generator=generator
                )
                weighted = [(int(label), 1 / labels) for label in drawn]
            else:
                weighted = [(label, float(chance)) for label, chance in enumerate(chances)]
            for place, (label, weight) in enumerate(weighted, start=1):
                gradients = torch.autograd.grad(
                    scores[label],
                    list(parameters.values()),
                    retain_graph=place < len(weighted),
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name].addcmul_(gradient, gradient, value=weight / len(samples))
    finally:
        model.requires_grad_(False)
    return total


def collect(data: CalibrationData, vectors: TaskVectors, options: FisherOptions) -> Calibrated:
    """Every expert's diagonal Fisher; one expert is in memory at a time."""
    folder = tempfile.TemporaryDirectory(prefix="epmq-fisher-")
    tensors, norms = [], []
    for task in data.progress.track(data.tasks, "squared gradients"):
        found = diagonal_fisher(
            data.expert(task),
            data.family,
            data.head(task),
            list(data.batches(task, 1)),
            options.labels,
            torch.Generator().manual_seed(options.seed),
        )
        norms.append(
            math.sqrt(sum(float(value.double().square().sum()) for value in found.values()))
        )
        file = Path(folder.name) / f"{task}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in found.items()}, file)
        tensors.append(stored_tensors([file]))
    return Calibrated(
        Fishers(folder, tensors, norms), {"fisher_norms": dict(zip(data.tasks, norms, strict=True))}
    )


def merge(base: Tensor, task_vectors: Tensor, options: FisherOptions, context: Context) -> Tensor:
    """``base [*]`` plus the Fisher-weighted mean of ``task_vectors [T, *]``."""
    known: Fishers = context.statistics
    norms = base.new_tensor([max(norm, options.floor) for norm in known.norms])
    scales = weight_column(options, context.tasks, task_vectors)
    scales = scales / norms.reshape_as(scales)
    fishers = known.of_tensor(context.name, base)
    return base + fisher_mean(task_vectors, fishers, scales / scales.sum(), options.floor)


METHOD = MergeMethod(
    options=FisherOptions,
    summary="mean weighted by squared gradients of the experts' predictions (needs data)",
    source="Fisher merging, arXiv 2111.09832",
    merge=merge,
    calibrate=collect,
    needs_heads=True,
    check=weight_problems,
)
