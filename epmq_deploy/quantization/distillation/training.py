"""Training weights towards the experts, epoch by epoch."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from epmq_deploy.artifacts.manifest import TrainedEpoch
from epmq_deploy.data.agreement import Judge, mean_divergence
from epmq_deploy.models.predictions import features_of, predict_logits
from epmq_deploy.models.token_batch import on_device
from epmq_deploy.progress import NoProgress
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.distillation.checkpointing import checkpointed
from epmq_deploy.quantization.distillation.epoch_batches import EpochBatches
from epmq_deploy.quantization.distillation.expert_outputs import (
    ExpertOutputs,
    distillation_loss,
    expert_outputs,
)
from epmq_deploy.quantization.distillation.optimizers import Optimizers
from epmq_deploy.quantization.distillation.schedule import rate_at
from epmq_deploy.quantization.distillation.state import (
    STANDING,
    Standing,
    TensorStore,
    copied,
    named_tensors,
    restore,
)

log = logging.getLogger(__name__)

_STATE = "distilled"
_LARGEST_GRADIENT = 1.0
# A rate that destroys the start is divided by this.
_LOWERED = 3.0


@dataclass(frozen=True)
class TrainingSettings:
    """How weights are trained.

    Attributes:
        epochs: how often every sample is seen, over all attempts.
        rate: highest learning rate of the first attempt.
        products: dtype in which matrices are multiplied, float32 or bfloat16.
    """

    epochs: int
    rate: float
    products: torch.dtype = torch.float32


class WeightTraining:
    """Trains some parameters of a model, in place.

    After each epoch the model is scored on held-back samples. An epoch that leaves it worse than
    the start had too high a rate: training goes on from the best weights with a third of it.

    Args:
        model: the student.
        parameters: of it, by name; all others stay as they are.
        ctx: experts and heads; its samples are those to train on.
        judge: scores on samples held back.
        batches: by task.
        settings: of the training.
        store: keeps the standing after every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ctx: CalibrationContext,
        judge: Judge,
        batches: Mapping[str, EpochBatches],
        settings: TrainingSettings,
        store: TensorStore | None = None,
    ) -> None:
        self._model, self._parameters = model, parameters
        self._ctx, self._judge, self._batches = ctx, judge, batches
        self._settings, self._store = settings, store
        self._start = copied(parameters)
        self._best: dict[str, Tensor] = {}
        self._steps = max(batch.count for batch in batches.values())

    def run(self) -> tuple[Standing, float]:
        """Train; leave the model with the weights of the best epoch, or of the start.

        Returns:
            Where the training ended, and the divergence of the start.
        """
        before = mean_divergence(self._judge.scores(self._model))
        standing = Standing(self._settings.rate, before)
        optimizers = self._optimizers()
        saved = self._store.load_tensors(_STATE) if self._store else None
        if saved:
            standing = STANDING.validate_json(saved[1])
            self._best = restore(saved[0], standing.steps, self._parameters, optimizers)
            log.info("distillation resumes after epoch %d", len(standing.curve))
        while len(standing.curve) < self._settings.epochs:
            standing = self._epoch(standing, optimizers)
            if not standing.curve[-1].divergence < before:
                optimizers, standing = self._optimizers(), self._lowered(standing)
            if self._store:
                tensors = named_tensors(self._parameters, self._best, optimizers)
                self._store.save_tensors(_STATE, tensors, STANDING.dump_json(standing).decode())
        self._assign(self._best or self._start)
        return standing, before

    def _optimizers(self) -> Optimizers:
        blocks = self._ctx.family.blocks(self._model)
        matrices = [f"{layer}.weight" for block in blocks for layer in block.layers]
        return Optimizers(self._parameters, matrices)

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])

    def _lowered(self, standing: Standing) -> Standing:
        """Go back to the best weights so far with a lower rate."""
        self._assign(self._best or self._start)
        rate = standing.rate / _LOWERED
        if len(standing.curve) < self._settings.epochs:
            log.warning(
                "distillation: with learning rate %g epoch %d moved the model away from the "
                "experts on held-back samples, so it goes on from epoch %d with %g",
                standing.rate,
                len(standing.curve),
                standing.chosen,
                rate,
            )
        return replace(standing, rate=rate, began=len(standing.curve), steps=0)

    def _epoch(self, standing: Standing, optimizers: Optimizers) -> Standing:
        """Train for one epoch, and score."""
        number = len(standing.curve)
        outputs = {task: self._outputs(task, number) for task in self._batches}
        description = (
            f"distilling, epoch {number + 1} of {self._settings.epochs} "
            f"(held-back divergence {standing.lowest:.4f})"
        )
        on_gpu = self._ctx.device.type != "cpu"
        blocks = self._ctx.family.blocks(self._model)
        with checkpointed(self._model, blocks) if on_gpu else nullcontext():
            self._train(standing, optimizers, outputs, number, description)
        divergence = mean_divergence(self._judge.scores(self._model))
        entry = TrainedEpoch(rate=standing.rate, divergence=divergence)
        log.info(
            "distillation: epoch %d of %d: divergence from the experts %.4f on held-back samples",
            number + 1,
            self._settings.epochs,
            divergence,
        )
        standing = replace(
            standing, steps=standing.steps + self._steps, curve=(*standing.curve, entry)
        )
        if divergence < standing.lowest:
            self._best = copied(self._parameters)
            standing = replace(standing, chosen=number + 1, lowest=divergence)
        return standing

    def _outputs(self, task: str, epoch: int) -> list[ExpertOutputs]:
        """Return what a task's expert gives for what the student will be shown."""
        ctx = self._ctx
        return expert_outputs(
            ctx.experts().become(task),
            ctx.family,
            ctx.expert_heads.get(task, ctx.heads.get(task)),
            self._batches[task].of_epoch(epoch),
            compares_features=task not in ctx.expert_heads,
        )

    def _train(
        self,
        standing: Standing,
        optimizers: Optimizers,
        outputs: Mapping[str, list[ExpertOutputs]],
        epoch: int,
        description: str,
    ) -> None:
        """Take the steps of one epoch, each on one batch of every task."""
        progress = self._ctx.progress or NoProgress()
        shown = {
            task: zip(batches.of_epoch(epoch), outputs[task], strict=True)
            for task, batches in self._batches.items()
        }
        planned = (self._settings.epochs - standing.began) * self._steps
        parameters = list(self._parameters.values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in progress.track(range(self._steps), description):
            for task, batches in shown.items():
                if (batch := next(batches, None)) is not None:
                    loss = self._loss(task, *batch) / len(shown)
                    loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
            optimizers.step(rate_at(standing.steps + step, planned, standing.rate))
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _loss(self, task: str, inputs: tuple[Tensor, ...], expert: ExpertOutputs) -> Tensor:
        ctx, low = self._ctx, self._settings.products == torch.bfloat16
        with torch.autocast(ctx.device.type, dtype=torch.bfloat16, enabled=low):
            features = features_of(ctx.family, self._model, on_device(inputs, ctx.device))
        features = features.to("cpu", torch.float32)
        predicted = predict_logits(ctx.family, ctx.heads.get(task), features, inputs)
        return distillation_loss(predicted, features, expert)
