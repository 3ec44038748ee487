"""AdaMerging (Yang et al., arXiv 2310.02575): tuning a coefficient per task and tensor, unlabelled.

Start, learning rate, steps, batch size and the bounds 0 and 1 are those of the authors' code for
CLIP (``main_layer_wise_adamerging.py``), which tunes on test samples; here they are calibration
samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from epmq_deploy.errors import RecipeError
from epmq_deploy.lazy import torch
from epmq_deploy.merging.base import (
    Calibrated,
    CalibrationData,
    Context,
    FromData,
    MergeMethod,
    TaskVectors,
)
from epmq_deploy.options.merging import DataOptions

if TYPE_CHECKING:
    from torch import Tensor


class AdaMergingOptions(DataOptions):
    """Layer-wise AdaMerging."""

    method: Literal["adamerging"] = "adamerging"
    initial: float = Field(0.3, ge=0, le=1, description="coefficients to start from")
    steps: int = Field(500, ge=0, description="steps of Adam; each takes a batch of every task")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam")
    batch_size: int = Field(16, ge=1, description="samples of a task per step")

    whole_model: ClassVar[frozenset[str]] = DataOptions.whole_model | {
        "steps",
        "learning_rate",
        "batch_size",
    }


def combine(base: Tensor, task_vectors: Tensor, coefficients: Tensor) -> Tensor:
    """Add ``task_vectors [T, *]``, multiplied by ``coefficients [T]``, to ``base [*]``."""
    return base + torch.einsum("t,t...->...", coefficients, task_vectors)


class _Tuning:
    """A merged model in memory whose parameters follow the coefficients.

    Task vectors are streamed tensor by tensor, twice a step: for the gradient of a coefficient,
    which is that of its tensor times the task vector, and for the tensor it gives.
    """

    def __init__(
        self, data: CalibrationData, vectors: TaskVectors, options: AdaMergingOptions
    ) -> None:
        self._data, self._vectors, self._options = data, vectors, options
        self._model = data.backbone()
        parameters = dict(self._model.named_parameters())
        self._tuned = {name: parameters[name] for name in vectors.names if name in parameters}
        self._base = {name: value.detach().clone() for name, value in self._tuned.items()}
        start = [[options.for_tensor(name).initial] * len(data.tasks) for name in self._tuned]
        self.coefficients = torch.tensor(start)

    def tune(self) -> None:
        """Run Adam on the coefficients, clamped to 0 and 1."""
        raw = torch.nn.Parameter(self.coefficients.clone())
        optimizer = torch.optim.Adam([raw], lr=self._options.learning_rate)
        streams = {task: self._cycle(task) for task in self._data.tasks}
        for _ in self._data.progress.track(range(self._options.steps), "tuning coefficients"):
            self.coefficients = raw.detach().clamp(0, 1)
            self._apply()
            self._differentiate(streams)
            within = (raw.detach() >= 0) & (raw.detach() <= 1)
            raw.grad = self._gradients() * within
            optimizer.step()
        self.coefficients = raw.detach().clamp(0, 1)
        self._apply()

    def mean_entropy(self) -> float:
        """Return the entropy with the current coefficients: mean over samples, then over tasks."""
        self._apply()
        total = 0.0
        for task in self._data.tasks:
            with torch.inference_mode():
                batches = self._data.batches(task, 64)
                entropies = [self._entropies(task, inputs) for inputs in batches]
            total += float(torch.cat(entropies).mean())
        return total / len(self._data.tasks)

    def by_name(self) -> dict[str, Tensor]:
        """Return the coefficients ``[T]`` of each tensor."""
        return dict(zip(self._tuned, self.coefficients, strict=True))

    def _entropies(self, task: str, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the mean entropy of each sample's predictions ``[n]``."""
        from epmq_deploy.models.problem_types import WITHOUT_CLASSES, entropy

        predicted = self._data.predictions(task, self._model, inputs)
        if predicted.problem_type in WITHOUT_CLASSES:
            raise RecipeError(
                f"task {task!r} has a {predicted.problem_type} head, whose predictions have no "
                "entropy that adamerging could lower; choose another merge method"
            )
        return predicted.per_sample(entropy(predicted.logits, predicted.problem_type))

    def _cycle(self, task: str) -> Iterator[tuple[Tensor, ...]]:
        for _ in itertools.count():
            yield from self._data.batches(task, self._options.batch_size)

    def _apply(self) -> None:
        for (name, parameter), row in zip(self._tuned.items(), self.coefficients, strict=True):
            stack = self._vectors.of_tensor(name)
            parameter.data.copy_(combine(self._base[name], stack, row.to(stack.device)))

    def _differentiate(self, streams: Mapping[str, Iterator[tuple[Tensor, ...]]]) -> None:
        """Set the model's gradients of the sum over tasks of a batch's mean entropy."""
        for parameter in self._tuned.values():
            parameter.grad = None
            parameter.requires_grad_(True)
        for task, stream in streams.items():
            self._entropies(task, next(stream)).mean().backward()  # type: ignore[no-untyped-call]
        for parameter in self._tuned.values():
            parameter.requires_grad_(False)

    def _gradients(self) -> Tensor:
        rows = torch.zeros_like(self.coefficients)
        for (name, parameter), row in zip(self._tuned.items(), rows, strict=True):
            if parameter.grad is not None:
                stack = self._vectors.of_tensor(name)
                row.copy_(torch.einsum("t...,...->t", stack, parameter.grad))
        return rows


def collect(
    data: CalibrationData, vectors: TaskVectors, options: AdaMergingOptions
) -> Calibrated[dict[str, Tensor]]:
    """Find coefficients that lower the entropy of the merged model's predictions."""
    tuning = _Tuning(data, vectors, options)
    before = tuning.mean_entropy()
    tuning.tune()
    details = {
        "entropy_before": before,
        "entropy_after": tuning.mean_entropy(),
        "mean_coefficients": dict(
            zip(data.tasks, tuning.coefficients.mean(dim=0).tolist(), strict=True)
        ),
    }
    return Calibrated(tuning.by_name(), details)


def merge(
    base: Tensor,
    task_vectors: Tensor,
    options: AdaMergingOptions,
    context: Context[dict[str, Tensor]],
) -> Tensor:
    """Apply the tuned coefficients; the initial ones to tensors that the model does not run."""
    coefficients = context.statistics.get(context.name)
    if coefficients is None:
        coefficients = task_vectors.new_full((len(task_vectors),), options.initial)
    return combine(base, task_vectors, coefficients.to(task_vectors.device))


METHOD = MergeMethod(
    options=AdaMergingOptions,
    summary="Task Arithmetic with a coefficient per tensor, tuned to low entropy of predictions "
    "(needs data)",
    source="AdaMerging, arXiv 2310.02575",
    merge=merge,
    statistics=FromData(collect, needs_heads=True),
)
