"""The calibration samples, heads and experts a recipe names, loaded for merging."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.heads import build_heads, head_classes
from epmq_deploy.data.loading import load_calibration
from epmq_deploy.data.pseudo_labels import (
    generate_pseudo_labels,
    pseudo_label_details,
    unlabelled_tasks,
    with_pseudo_labels,
)
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.data.targets import label_tensor
from epmq_deploy.errors import MismatchError
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.experts import ExpertBackbone, Sources
from epmq_deploy.models.input_sources import inputs_of_experts
from epmq_deploy.models.predictions import PredictedLogits, features_of, predict_logits
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.models.token_batch import on_device
from epmq_deploy.options.merging import SampleNeed
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import Recipe

# Samples tokenized at a time.
_BATCH = 64


@dataclass(frozen=True)
class RecipeData:
    """The ``CalibrationData`` of a recipe; one expert's weights are in memory at a time.

    Attributes:
        sources: base and experts.
        samples: by task.
        heads: by task, on the CPU; empty for text-generation models, and where none are needed.
        experts: one backbone that takes each expert's weights in turn.
        progress: shows the progress of a long pass.
        details: on the samples, for the manifest.
        classes: of the heads, by task.
    """

    sources: Sources
    samples: Mapping[str, Samples]
    heads: Mapping[str, TaskHead]
    experts: ExpertBackbone
    progress: Progress
    details: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, HeadClasses] = field(default_factory=dict)

    @property
    def family(self) -> ModelFamily:
        """Family of base and experts."""
        return self.sources.family

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the experts."""
        return tuple(self.sources.experts)

    def batches(self, task: str, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield a task's model inputs, at most ``size`` samples at a time, on the device."""
        for inputs in batches(self.samples[task], self.family, self.sources.base.folder, size):
            yield on_device(inputs, self.experts.device)

    def predictions(
        self, task: str, model: nn.Module, inputs: tuple[Tensor, ...]
    ) -> PredictedLogits:
        """Return a model's predictions for a batch of a task, on the device; differentiable."""
        head = self.heads.get(task)
        if head is not None:
            head = head.to(self.experts.device)
        return predict_logits(self.family, head, features_of(self.family, model, inputs), inputs)

    def targets(self, task: str) -> Tensor:
        """Return what the task's head should predict for its samples; see ``data.targets``.

        Raises:
            RecipeError: the data have no labels, or they are none of this head.
        """
        folder = self.sources.base.folder
        return label_tensor(self.samples[task], self.classes[task], self.family, folder)

    def backbone(self) -> nn.Module:
        """Return a new model with the base's weights, float32, on the device."""
        return self.family.load(self.sources.base.folder).to(self.experts.device)

    def answered(self) -> "RecipeData":
        """Return these data with the experts' answers where answers are missing."""
        if not unlabelled_tasks(self.samples):
            return self
        folder = self.sources.base.folder
        answers = generate_pseudo_labels(
            self.samples, self.family, folder, self.experts.become, self.progress
        )
        return replace(
            self,
            samples=with_pseudo_labels(self.samples, answers),
            details=pseudo_label_details(answers),
        )


def load_data(
    recipe: Recipe,
    sources: Sources,
    need: SampleNeed,
    *,
    heads: bool,
    device: torch.device,
    progress: Progress,
) -> RecipeData:
    """Load what a merge needs in addition to weights; no expert's weights are read.

    Samples for text generation may lack answers; see ``RecipeData.answered``.

    Args:
        recipe: names the data and the heads.
        sources: base and experts.
        need: says which samples.
        heads: whether predictions are needed, and so the heads of classifiers.
        device: where models run.
        progress: shows the progress of a long pass.

    Raises:
        MismatchError: calibration data or heads are missing or cannot be used; all at once.
    """
    samples, problems = load_calibration(
        recipe.tasks,
        sources.family,
        sources.base.folder,
        limit=need.limit,
        seed=need.seed,
        option=need.option,
        without=f", which {need.purpose} needs",
        preflight=recipe.preflight,
        inputs=inputs_of_experts(recipe.tasks, sources),
    )
    experts = ExpertBackbone(sources, device)
    task_heads: dict[str, TaskHead] = {}
    if heads and not generates_text(sources.family):
        try:
            features = experts.embedding_width()
            folder = sources.base.folder
            task_heads = build_heads(recipe.tasks, sources.family, folder, features, device=device)
            problems += [
                f"task {task!r} has no head, which {need.purpose} needs"
                for task in recipe.tasks
                if task not in task_heads
            ]
        except MismatchError as error:
            problems += error.problems
    if problems:
        raise MismatchError(need.purpose, problems)
    classes = {task: head_classes(recipe.tasks[task], head) for task, head in task_heads.items()}
    return RecipeData(sources, samples, task_heads, experts, progress, classes=classes)
