"""Quantizing a model block by block, in the order its layers run."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import (
    BlockInput,
    advance,
    capture_block_inputs,
    input_of,
    input_statistics,
    paired_statistics,
)
from epmq_deploy.calibration.norms import NormSums, fit_affine, pre_affine
from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
from epmq_deploy.calibration.target import CalibrationTarget, LayerWeights, QuantizeOptions
from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.models import Block, Group, ModelFamily
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.layer import LayerReport, quantize_layer
from epmq_deploy.quantization.quantized_linear import QuantizedLinear

log = logging.getLogger(__name__)

# Per task, a function that yields batches of model inputs.
TaskBatches = Mapping[str, Callable[[], Iterable[tuple[Tensor, ...]]]]


class Experts(Protocol):
    """Where guided targets get base and experts from, a piece at a time."""

    def base_tensor(self, name: str) -> Tensor:
        """One of the base's tensors, float32, on the model's device."""
        ...

    def tensor(self, task: str, name: str) -> Tensor:
        """One of an expert's tensors, float32, on the model's device."""
        ...

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """A model with an expert's weights, but for the modules ``without``."""
        ...

    def module(self, task: str, name: str) -> nn.Module:
        """One module with an expert's weights."""
        ...


@dataclass
class QuantizedModel:
    """What quantizing a model yields.

    Attributes:
        layers: codes and grids by layer name.
        replaced: parameters given new values (re-fitted biases and norms), by parameter name.
        reports: one per layer quantized or norm re-fitted, in running order, then those kept.
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
    experts: Experts | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize ``model`` in place (its weights become the dequantized ones).

    True sequential: the inputs of every layer are gathered with all earlier layers already
    quantized; layers that share an input share one Gram matrix. Experts are read one layer or
    block at a time.

    Args:
        model: the merged model, on the device to work on.
        family: its family.
        target: the method.
        options: the method's options.
        batches: per task, a function that yields batches of model inputs.
        experts: required by guided targets.
        progress: shows one step per block.

    Raises:
        NumericsError: a layer could not be solved as asked; names it.
    """
    progress = progress or NoProgress()
    blocks = family.blocks(model)
    check_skip(blocks, options)
    walk = _Walk(model, family, target, options, experts)
    walk.start(blocks, batches)
    for block in progress.track(blocks, "quantizing"):
        for group in block.groups:
            walk.quantize_group(block, group)
        walk.advance(block)
    walk.report_kept(blocks)
    return walk.result


def check_skip(blocks: tuple[Block, ...], options: QuantizeOptions) -> None:
    """Make sure every pattern of ``skip`` names a layer.

    Raises:
        RecipeError: names the patterns that match nothing.
    """
    layers = [name for block in blocks for name in block.layers]
    idle = [
        pattern
        for pattern in options.skip
        if not any(fnmatchcase(name, pattern) for name in layers)
    ]
    if idle:
        raise RecipeError(
            f"quantize.skip: {', '.join(idle)} matches no layer; layers are named like {layers[0]}"
        )


@dataclass
class _Walk:
    """One pass through a model: what each block receives, in the student and in the experts."""

    model: nn.Module
    family: ModelFamily
    target: CalibrationTarget[Any]
    options: QuantizeOptions
    experts: Experts | None
    result: QuantizedModel = field(default_factory=QuantizedModel)
    inputs: dict[str, list[BlockInput]] = field(default_factory=dict)
    expert_inputs: dict[str, list[BlockInput]] = field(default_factory=dict)

    def start(self, blocks: tuple[Block, ...], batches: TaskBatches) -> None:
        """Run everything before the first block."""
        for task, make in batches.items():
            self.inputs[task] = self._first_inputs(self.model, blocks[0], make())
            if self.target.uses_features(self.options):
                expert = self._guide().become(task, without=[block.name for block in blocks])
                self.expert_inputs[task] = self._first_inputs(expert, blocks[0], make())

    def _first_inputs(
        self, model: nn.Module, first: Block, batches: Iterable[tuple[Tensor, ...]]
    ) -> list[BlockInput]:
        device = next(self.model.parameters()).device

        def run(batch: tuple[Tensor, ...]) -> object:
            return self.family.embed(model, *(value.to(device) for value in batch))

        return capture_block_inputs(model.get_submodule(first.name), run, batches)

    def advance(self, block: Block) -> None:
        """Take all hidden states through a block that is done."""
        for task_inputs in self.inputs.values():
            advance(self.model.get_submodule(block.name), task_inputs)
        for task, expert_inputs in self.expert_inputs.items():
            advance(self._guide().module(task, block.name), expert_inputs)

    def _guide(self) -> Experts:
        assert self.experts is not None, f"{self.target.name} needs experts"
        return self.experts

    def quantize_group(self, block: Block, group: Group) -> None:
        """Quantize layers that share an input, after re-fitting the norm it comes from."""
        if group.norm is not None and self.target.norm_mix(self.options) is not None:
            self._refit_norm(block, group.norm)
        names = [name for name in group.layers if not self._skipped(name)]
        if not names:
            return
        sums = self._sums(block, names)
        for name in names:
            layer = _linear(self.model, name)
            weights = self._weights(name, layer)
            problem = self.target.problem(weights, sums, self.options)
            done = quantize_layer(name, layer.weight, layer.bias, problem, sums, self.options)
            self._apply(name, layer, done.linear, done.bias)
            self.result.reports.append(done.report)
            if done.report.reason:
                log.warning("%s: %s (%s)", name, done.report.status, done.report.reason)

    def _weights(self, name: str, layer: nn.Linear) -> LayerWeights:
        if not self.target.uses_experts:
            return LayerWeights(name, layer.weight, layer.bias)
        base = self._guide().base_tensor(f"{name}.weight")
        has_bias = layer.bias is not None
        base_bias = self._guide().base_tensor(f"{name}.bias") if has_bias else None
        return LayerWeights(name, layer.weight, layer.bias, base, base_bias)

    def _refit_norm(self, block: Block, name: str) -> None:
        """Bring a norm's outputs closer to the experts', on the student's inputs."""
        norm = self.model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm), "families list LayerNorms only"
        mix = self.target.norm_mix(self.options) or 0.0
        student = self.model.get_submodule(block.name)
        sums = NormSums.zeros(norm.weight.shape[0], norm.weight.device)
        for task, items in self.inputs.items():
            gain = self._guide().tensor(task, f"{name}.weight")
            bias = self._guide().tensor(task, f"{name}.bias")
            expert_items = self.expert_inputs.get(task)
            own = None
            if expert_items is not None:
                expert = self._guide().module(task, block.name)
                own = expert.get_submodule(name.removeprefix(f"{block.name}."))
            # Every task counts alike, however many tokens it has.
            tokens = sum(item.hidden.numel() // item.hidden.shape[-1] for item in items)
            for index, item in enumerate(items):
                activations = pre_affine(norm, input_of(student, norm, item))
                wanted = gain * activations + bias
                if expert_items is not None and own is not None:
                    theirs = pre_affine(norm, input_of(expert, own, expert_items[index]))
                    wanted = (1 - mix) * wanted + mix * (gain * theirs + bias)
                sums.add(activations, wanted, 1.0 / tokens)
        damping = self.target.norm_damping(self.options)
        gain, bias = fit_affine(sums, norm.weight, norm.bias, damping)
        before, after = sums.error(norm.weight, norm.bias), sums.error(gain, bias)
        norm.weight.data, norm.bias.data = gain, bias
        self.result.replaced |= {f"{name}.weight": gain.cpu(), f"{name}.bias": bias.cpu()}
        self.result.reports.append(
            LayerReport(name, "refitted", error_before=before, error_after=after)
        )

    def _sums(self, block: Block, names: list[str]) -> GroupSums:
        """Sum statistics over tasks, holding one task's Gram matrix at a time."""
        first = _linear(self.model, names[0])
        sums = GroupSums.zeros(first.in_features, first.weight.device)
        for task in self.inputs:
            statistics = self._statistics(block, names, task)
            if not bool(torch.isfinite(statistics.gram).all()):
                raise NumericsError(
                    f"layer {names[0]}: task {task!r} gives NaN or infinite activations"
                )
            cross, output_mean = {}, {}
            if self.target.uses_experts:
                for name in names:
                    weight = self._guide().tensor(task, f"{name}.weight")
                    wanted = self.target.expert_outputs(name, weight, statistics, self.options)
                    cross[name], output_mean[name] = wanted.cross, wanted.mean
                    if _linear(self.model, name).bias is not None:
                        output_mean[name] = wanted.mean + self._guide().tensor(task, f"{name}.bias")
            weight_of_task = self.target.task_weight(statistics, self.options)
            sums.add(statistics, weight_of_task, cross, output_mean)
        if self.inputs and sums.tokens < 2 * first.in_features:
            log.warning(
                "%s: %d calibration tokens for %d input columns; at least %d are advisable, "
                "add samples",
                names[0],
                sums.tokens,
                first.in_features,
                2 * first.in_features,
            )
        return sums

    def _statistics(self, block: Block, names: list[str], task: str) -> TaskStatistics:
        student = self.model.get_submodule(block.name)
        first = _linear(self.model, names[0])
        if task not in self.expert_inputs:
            return input_statistics(student, first, self.inputs[task])
        expert = self._guide().module(task, block.name)
        layers = {name: _linear(expert, name.removeprefix(f"{block.name}.")) for name in names}
        return paired_statistics(
            student, first, self.inputs[task], expert, layers, self.expert_inputs[task]
        )

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
        listed = {name for block in blocks for name in block.layers}
        for name, module in self.model.named_modules():
            weighted = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
            if weighted and name not in self.result.layers:
                reason = "skipped by option" if name in listed else "outside the blocks"
                self.result.reports.append(LayerReport(name, "kept", reason))


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear), "families list linear layers only"
    return layer


def apply_quantized(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], replaced: Mapping[str, Tensor]
) -> None:
    """Give ``model`` the dequantized weights and replaced parameters, in place."""
    for name, linear in layers.items():
        layer = _linear(model, name)
        layer.weight.data = linear.dequantize().to(layer.weight)
    for name, value in replaced.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter)
