"""Distillation: scales and vectors are tuned end to end towards the experts' predictions.

Vectors are biases, norms and CLIP's class token. Codes and zero points stay fixed, as in the second
phase of EfficientQAT (Chen et al., arXiv 2407.11062). The loss is the divergence from each expert's
softened predictions on its own calibration samples (Hinton et al., arXiv 1503.02531); no labels are
used.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from epmq_deploy.artifacts.manifest import Distillation
from epmq_deploy.data.agreement import Judge, mean_divergence
from epmq_deploy.data.samples import batches
from epmq_deploy.models.predictions import PredictedLogits, features_of, predict_logits
from epmq_deploy.models.problem_types import divergence
from epmq_deploy.models.token_batch import on_device
from epmq_deploy.progress import NoProgress
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.results import QuantizedLinear, QuantizedModel
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.quantization.solver.grid import expand_groups

log = logging.getLogger(__name__)

# Samples per step; smaller than calibration's batches, as every step moves the parameters.
_BATCH = 16
# Highest learning rate: of biases and norms as they are, of scales relative to their size.
_RATE = 5e-4
_WARM_UP = 0.1
_TEMPERATURE = 2.0


def distill(
    model: nn.Module,
    quantized: QuantizedModel,
    ctx: CalibrationContext,
    epochs: int,
    products: torch.dtype = torch.float32,
) -> tuple[QuantizedModel, Distillation]:
    """Tune a quantized model on its calibration samples.

    Args:
        model: with the weights of ``quantized``; has those returned afterwards.
        quantized: what calibration yielded; left unmodified.
        ctx: samples and experts, with heads of every task for classifiers.
        epochs: how often every sample is seen.
        products: dtype in which matrices are multiplied, float32 or bfloat16.

    Returns:
        The model with new scales, biases and norms, and the divergence from the experts before and
        after. A result that did not lower the divergence is undone, with a warning.
    """
    judge = ctx.judge(ctx.samples)
    before = mean_divergence(judge.scores(model))
    scales = _free_scales(model, quantized)
    vectors = {name: value for name, value in model.named_parameters() if value.dim() == 1}
    originals = {name: vector.data for name, vector in vectors.items()}
    for vector in vectors.values():
        # On the CPU the parameter shares memory with calibration's result, which must not change.
        vector.data = vector.data.clone()
    try:
        _train(model, [*scales.values(), *vectors.values()], ctx, judge, epochs, products)
    finally:
        for name in scales:
            parametrize.remove_parametrizations(model.get_submodule(name), "weight")
        model.requires_grad_(False)
    layers = {
        name: replace(quantized.layers[name], scales=_rescaled(quantized.layers[name], change))
        for name, change in scales.items()
    }
    replaced = {name: value.detach().cpu() for name, value in vectors.items()}
    # Bit for bit as they will be stored.
    apply_quantized(model, layers, replaced)
    after = mean_divergence(judge.scores(model))
    outcome = Distillation(epochs=epochs, before=before, after=after, kept=after < before)
    log.info("distillation: divergence from the experts %.4f, was %.4f", after, before)
    if not after < before:
        log.warning(
            "distillation did not lower the divergence from the experts, so its result is discarded"
        )
        apply_quantized(model, {name: quantized.layers[name] for name in scales}, originals)
        return quantized, outcome
    tuned = replace(
        quantized,
        layers=quantized.layers | layers,
        replaced=quantized.replaced | replaced,
    )
    return tuned, outcome


class _Rescaled(nn.Module):
    """A layer's weight with its scales times ``exp(change)``, ``change`` float32 ``[N, G]``."""

    def __init__(self, linear: QuantizedLinear, device: torch.device) -> None:
        super().__init__()
        self._group_size = linear.group_size
        self.change = nn.Parameter(torch.zeros_like(linear.scales, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, ``[N, K]``, rescaled."""
        return weight * expand_groups(self.change.exp(), self._group_size, weight.shape[1])


def _free_scales(model: nn.Module, quantized: QuantizedModel) -> dict[str, nn.Parameter]:
    """Make the scales of linear layers trainable; return the logarithms of their changes by layer.

    A layer that shares its weight with an embedding keeps its scales: they are the embedding's.
    """
    model.requires_grad_(False)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    changes = {}
    for name, linear in quantized.layers.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and id(layer.weight) not in tables:
            rescaled = _Rescaled(linear, layer.weight.device)
            parametrize.register_parametrization(layer, "weight", rescaled, unsafe=True)
            changes[name] = rescaled.change
    return changes


def _rescaled(linear: QuantizedLinear, change: Tensor) -> Tensor:
    return linear.scales * change.detach().exp().cpu()


def _train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    ctx: CalibrationContext,
    judge: Judge,
    epochs: int,
    products: torch.dtype,
) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
    steps = epochs * sum(-(-len(samples) // _BATCH) for samples in ctx.samples.values())
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _RATE, total_steps=max(steps, 2), pct_start=_WARM_UP
    )
    device, low = ctx.device, products == torch.bfloat16
    progress = ctx.progress or NoProgress()
    for _ in progress.track(range(epochs), "distilling"):
        for task, inputs, target in _interleaved(judge):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                features = features_of(ctx.family, model, on_device(inputs, device))
            features = features.to("cpu", torch.float32)
            predicted = predict_logits(ctx.family, judge.heads.get(task), features, inputs)
            divergences = predicted.per_sample(
                divergence(
                    predicted.logits / _TEMPERATURE,
                    target.logits / _TEMPERATURE,
                    predicted.problem_type,
                )
            )
            optimizer.zero_grad()
            divergences.mean().mul(_TEMPERATURE**2).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _interleaved(judge: Judge) -> Iterator[tuple[str, tuple[Tensor, ...], PredictedLogits]]:
    """Yield one batch of every task in turn, with the expert's predictions for it."""
    running = {
        task: batches(samples, judge.family, judge.folder, _BATCH)
        for task, samples in judge.samples.items()
    }
    done = dict.fromkeys(running, 0)
    while running:
        for task in list(running):
            inputs = next(running[task], None)
            if inputs is None:
                del running[task]
                continue
            start = done[task]
            done[task] += len(inputs[0])
            yield task, inputs, judge.wanted[task].of_samples(start, done[task])
