"""The calibration samples, heads and experts a recipe names, loaded for merging."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.pseudo_labels import (
    answer_details,
    with_answers,
    without_answers,
    write_answers,
)
from epmq_deploy.data.samples import Samples, batches, load_calibration
from epmq_deploy.errors import MismatchError
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.experts import ExpertBackbone, Sources
from epmq_deploy.models.predictions import Predictions, predictions
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import Recipe


@dataclass(frozen=True)
class RecipeData:
    """The ``CalibrationData`` of a recipe; one expert's weights are in memory at a time.

    Attributes:
        sources: base and experts.
        samples: by task.
        heads: by task, on the CPU; empty where none were asked for, or models write texts.
        experts: one backbone that takes on each expert's weights in turn.
        progress: shows how far a long pass got.
        details: what the manifest says of the samples.
    """

    sources: Sources
    samples: Mapping[str, Samples]
    heads: Mapping[str, TaskHead]
    experts: ExpertBackbone
    progress: Progress
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> ModelFamily:
        """Of base and experts."""
        return self.sources.family

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return tuple(self.sources.experts)

    def batches(self, task: str, size: int) -> Iterator[tuple[Tensor, ...]]:
        """A task's model inputs, at most ``size`` samples at a time, on the device."""
        for inputs in batches(self.samples[task], self.family, self.sources.base.folder, size):
            yield tuple(value.to(self.experts.device) for value in inputs)

    def predictions(self, task: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> Predictions:
        """What a model predicts for a batch of a task, on the device; differentiable."""
        head = self.heads.get(task)
        placed = None if head is None else head.to(self.experts.device)
        return predictions(self.family, placed, self.family.embed(model, *inputs), inputs)

    def backbone(self) -> nn.Module:
        """A model of its own with the base's weights, float32, on the device."""
        return self.family.load(self.sources.base.folder).to(self.experts.device)

    def answered(self) -> "RecipeData":
        """The data with answers; where there are none, each task's expert writes them."""
        if not without_answers(self.samples):
            return self
        folder = self.sources.base.folder
        written = write_answers(
            self.samples, self.family, folder, self.experts.become, self.progress
        )
        return replace(
            self, samples=with_answers(self.samples, written), details=answer_details(written)
        )


def load_data(
    recipe: Recipe,
    sources: Sources,
    *,
    samples: int,
    option: str,
    seed: int,
    heads: bool,
    purpose: str,
    device: torch.device,
    progress: Progress,
) -> RecipeData:
    """Load what a merge needs beside weights; no expert runs, nor is read.

    Samples of tasks in words may lack answers; see ``RecipeData.answered``.

    Args:
        recipe: names the data and the heads.
        sources: base and experts.
        samples: at most this many per task.
        option: that says so, for messages (``merge.samples``).
        seed: of their choice.
        heads: whether models are to predict: classifiers need heads for that.
        purpose: what needs them, for messages (``merge.search``).
        device: where models run.
        progress: shows how far a long pass got.

    Raises:
        MismatchError: calibration data or heads are missing or cannot be used; all at once.
    """
    chosen, problems = load_calibration(
        recipe.tasks,
        sources.family,
        sources.base.folder,
        limit=samples,
        seed=seed,
        option=option,
        without=f", which {purpose} needs",
    )
    experts = ExpertBackbone(sources, device)
    built: dict[str, TaskHead] = {}
    if heads and not sources.family.generates_text:
        try:
            features = experts.embedding_width()
            folder = sources.base.folder
            built = build_heads(recipe.tasks, sources.family, folder, features, device=device)
            problems += [
                f"task {task!r} has no head, which {purpose} needs"
                for task in recipe.tasks
                if task not in built
            ]
        except MismatchError as error:
            problems += error.problems
    if problems:
        raise MismatchError(purpose, problems)
    return RecipeData(sources, chosen, built, experts, progress)
