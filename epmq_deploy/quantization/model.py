"""Quantizing a model block by block, in the order its layers run."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import (
    BlockInput,
    advance,
    capture_block_inputs,
    input_statistics,
)
from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.calibration.target import CalibrationTarget, QuantizeOptions
from epmq_deploy.errors import NumericsError
from epmq_deploy.models import Block, ModelFamily
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.layer import LayerReport, quantize_layer
from epmq_deploy.quantization.quantized_linear import QuantizedLinear

log = logging.getLogger(__name__)

# Task name and tensor name to an expert's tensor.
ExpertTensors = Callable[[str, str], Tensor]
TaskBatches = Mapping[str, Callable[[], Any]]


@dataclass
class QuantizedModel:
    """What quantizing a model yields.

    Attributes:
        layers: codes and grids by layer name.
        replaced: parameters given new values (re-fitted biases), by parameter name.
        reports: one per linear layer, quantized or kept, in running order.
    """

    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)


def quantize_model(
    model: nn.Module,
    family: ModelFamily,
    target: CalibrationTarget[Any],
    options: QuantizeOptions,
    *,
    batches: TaskBatches,
    experts: ExpertTensors,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize ``model`` in place (its weights become the dequantized ones).

    True sequential: the inputs of every layer are gathered with all earlier layers already
    quantized; layers that share an input share one Gram matrix. Experts' weights are read one
    layer at a time.

    Args:
        model: the merged model, on the device to work on.
        family: its family.
        target: the method.
        options: the method's options.
        batches: per task, a function that yields batches of model inputs.
        experts: reads one expert's tensor; only called for guided targets.
        progress: shows one step per block.

    Raises:
        NumericsError: a layer could not be solved as asked; names it.
    """
    progress = progress or NoProgress()
    blocks = family.blocks(model)
    result = QuantizedModel()
    walk = _Walk(model, family, target, options, experts, result)
    inputs = walk.first_inputs(blocks[0], batches) if target.uses_data else {}
    for block in progress.track(blocks, "quantizing"):
        for group in block.groups:
            walk.quantize_group(block, group, inputs)
        for task_inputs in inputs.values():
            advance(model.get_submodule(block.name), task_inputs)
    walk.report_kept(blocks)
    return result


@dataclass
class _Walk:
    """The state of one pass through a model."""

    model: nn.Module
    family: ModelFamily
    target: CalibrationTarget[Any]
    options: QuantizeOptions
    experts: ExpertTensors
    result: QuantizedModel

    def first_inputs(self, first: Block, batches: TaskBatches) -> dict[str, list[BlockInput]]:
        device = next(self.model.parameters()).device

        def run(batch: tuple[Tensor, ...]) -> object:
            return self.family.embed(self.model, *(value.to(device) for value in batch))

        block = self.model.get_submodule(first.name)
        return {task: capture_block_inputs(block, run, make()) for task, make in batches.items()}

    def quantize_group(
        self, block: Block, group: tuple[str, ...], inputs: Mapping[str, list[BlockInput]]
    ) -> None:
        names = [name for name in group if not self._skipped(name)]
        if not names:
            return
        sums = self._sums(block, names, inputs)
        for name in names:
            layer = self.model.get_submodule(name)
            assert isinstance(layer, nn.Linear), "families list linear layers only"
            problem = self.target.problem(layer.weight, sums, sums.cross.get(name), self.options)
            done = quantize_layer(name, layer.weight, layer.bias, problem, sums, self.options)
            self._apply(name, layer, done.linear, done.bias)
            self.result.reports.append(done.report)
            if done.report.reason:
                log.warning("%s: %s (%s)", name, done.report.status, done.report.reason)

    def _sums(
        self, block: Block, names: list[str], inputs: Mapping[str, list[BlockInput]]
    ) -> GroupSums:
        """Sum statistics over tasks, holding one task's Gram matrix at a time."""
        first = self.model.get_submodule(names[0])
        assert isinstance(first, nn.Linear), "families list linear layers only"
        sums = GroupSums.zeros(first.in_features, first.weight.device)
        for task, task_inputs in inputs.items():
            statistics = input_statistics(self.model.get_submodule(block.name), first, task_inputs)
            if not bool(torch.isfinite(statistics.gram).all()):
                raise NumericsError(
                    f"layer {names[0]}: task {task!r} gives NaN or infinite activations"
                )
            cross, output_mean = {}, {}
            if self.target.uses_experts:
                for name in names:
                    weight = self._expert(task, f"{name}.weight")
                    cross[name] = self.target.cross(weight, statistics, self.options)
                    mean = weight.to(torch.float64) @ statistics.mean
                    if self.model.get_submodule(name).bias is not None:
                        mean = mean + self._expert(task, f"{name}.bias").to(torch.float64)
                    output_mean[name] = mean
            weight_of_task = self.target.task_weight(statistics, self.options)
            sums.add(statistics, weight_of_task, cross, output_mean)
        if inputs and sums.tokens < 2 * first.in_features:
            log.warning(
                "%s: %d calibration tokens for %d input columns; at least %d are advisable, "
                "add samples",
                names[0],
                sums.tokens,
                first.in_features,
                2 * first.in_features,
            )
        return sums

    def _expert(self, task: str, name: str) -> Tensor:
        return self.experts(task, name).to(next(self.model.parameters()).device)

    def _apply(
        self, name: str, layer: nn.Linear, linear: QuantizedLinear, bias: Tensor | None
    ) -> None:
        layer.weight.data = linear.dequantize().to(layer.weight.device)
        self.result.layers[name] = linear
        if bias is not None:
            layer.bias.data = bias
            self.result.replaced[f"{name}.bias"] = bias.cpu()

    def _skipped(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.options.skip)

    def report_kept(self, blocks: tuple[Block, ...]) -> None:
        """Report every layer left in float; nothing stays unquantized unsaid."""
        listed = {name for block in blocks for group in block.groups for name in group}
        for name, module in self.model.named_modules():
            weighted = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
            if weighted and name not in self.result.layers:
                reason = "skipped by option" if name in listed else "outside the blocks"
                self.result.reports.append(LayerReport(name, "kept", reason))


def apply_quantized(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], replaced: Mapping[str, Tensor]
) -> None:
    """Give ``model`` the dequantized weights and replaced parameters, in place."""
    for name, linear in layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), "only linear layers are quantized"
        layer.weight.data = linear.dequantize().to(layer.weight)
    for name, value in replaced.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter)
