"""Distillation of all weights, before they are quantized.

The closed form aims each layer at its expert's outputs; this aims the whole model at what experts
predict. It starts from the closed form's weights, unrounded, and is judged on samples that neither
saw.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from epmq_deploy.artifacts.manifest import WeightDistillation
from epmq_deploy.data.samples import Samples
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.distillation.augmentation import Augmentation
from epmq_deploy.quantization.distillation.epoch_batches import EpochBatches
from epmq_deploy.quantization.distillation.state import TensorStore, copied
from epmq_deploy.quantization.distillation.training import TrainingSettings, WeightTraining
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS

log = logging.getLogger(__name__)

_START = "distillation-start"
# Of every eight samples of a task, seven train and one scores.
_HELD_BACK = 8
# Highest learning rate to begin with; one that destroys the start is lowered.
_RATE = 3e-4
# Samples per step over all tasks, and at least of each.
_BATCH, _LEAST = 64, 4
# Passes over all samples that one epoch is worth: the student forward, backward (as two) and the
# expert forward, in units of the student's three.
_PASSES_PER_EPOCH = 4 / 3


def distill_weights(
    options: QuantizeOptions,
    ctx: CalibrationContext,
    epochs: int,
    store: TensorStore | None = None,
) -> tuple[nn.Module | None, WeightDistillation]:
    """Train the weights that ``options`` give unrounded towards the experts' predictions.

    Args:
        options: of the method whose weights are the start.
        ctx: samples and experts, with heads of every task for classifiers.
        epochs: how often every sample is seen.
        store: keeps the standing after every epoch, for a run that goes on.

    Returns:
        The trained model, None where it is not closer to the experts on held-back samples than the
        start; and what happened.

    Raises:
        RecipeError: a task has too few samples to hold some back.
    """
    method = QUANTIZATION_METHODS[options.method]
    choice = method.samples(options)
    assert choice is not None, "options that ask for training without samples are refused"
    fitting, held_back = split(ctx)
    model = _start(options, fitting, store)
    parameters = trainable(model)
    training = WeightTraining(
        model,
        parameters,
        fitting,
        ctx.judge(held_back),
        _batches(fitting, choice.seed),
        TrainingSettings(epochs, _RATE, method.products_dtype(options)),
        store,
    )
    standing, before = training.run()
    outcome = WeightDistillation(
        epochs=epochs,
        curve=standing.curve,
        chosen=standing.chosen,
        before=before,
        after=standing.lowest,
        kept=standing.chosen > 0,
        passes=_PASSES_PER_EPOCH * len(standing.curve),
    )
    if not outcome.kept:
        log.warning(
            "distillation of weights did not bring the model closer to the experts on held-back "
            "samples, so its result is discarded"
        )
        return None, outcome
    log.info(
        "distillation of weights: divergence from the experts %.4f after epoch %d, was %.4f, on "
        "held-back samples",
        outcome.after,
        outcome.chosen,
        outcome.before,
    )
    return model, outcome


def split(ctx: CalibrationContext) -> tuple[CalibrationContext, Mapping[str, Samples]]:
    """Return the context with the samples to train on, and those held back.

    Raises:
        RecipeError: a task has too few.
    """
    few = [task for task, samples in ctx.samples.items() if len(samples) < 2 * _HELD_BACK]
    if few:
        raise RecipeError(
            f"quantize.distill_weights needs at least {2 * _HELD_BACK} calibration samples for "
            f"every task; too few for {', '.join(few)}: add samples or leave it out"
        )
    fitting, held_back = {}, {}
    for task, samples in ctx.samples.items():
        count = len(samples) // _HELD_BACK
        held_back[task] = replace(samples, indices=samples.indices[:count])
        fitting[task] = replace(samples, indices=samples.indices[count:])
    return replace(ctx, samples=fitting), held_back


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to train: all but embedding tables and what shares their weights.

    Few samples show few rows of a table.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in tables and parameter.is_floating_point()
    }


def _start(
    options: QuantizeOptions, ctx: CalibrationContext, store: TensorStore | None
) -> nn.Module:
    """Return the model with the weights that ``options`` give unrounded."""
    if store and (saved := store.load_tensors(_START)):
        model = ctx.family.load(ctx.folder).to(ctx.device)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(saved[0][name])
        return model
    model, _ = ctx.calibrate(options, rounding=False)
    model.requires_grad_(False)
    if store:
        store.save_tensors(_START, copied(model.named_parameters()), "")
    return model


def _batches(ctx: CalibrationContext, seed: int) -> dict[str, EpochBatches]:
    """Return the batches of every task."""
    each = max(_BATCH // len(ctx.samples), _LEAST)
    count = max(-(-len(samples) // each) for samples in ctx.samples.values())
    augmentation = Augmentation(None if generates_text(ctx.family) else ctx.family.modality)
    return {
        task: EpochBatches(samples, ctx.family, ctx.folder, augmentation, count, seed)
        for task, samples in ctx.samples.items()
    }
