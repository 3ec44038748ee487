"""One pass through a model: what each block receives, and what its layers become."""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import (
    BlockBatch,
    advance,
    capture_block_batch,
    input_of,
    record,
)
from epmq_deploy.calibration.cache import ActivationCache, Kept
from epmq_deploy.calibration.statistics import Accumulator, GroupSums, TaskStatistics
from epmq_deploy.errors import NumericsError
from epmq_deploy.models import Block, Group, ModelFamily
from epmq_deploy.models.tokens import TokenWeights, counted
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.base import Guide, LayerWeights, QuantizationMethod
from epmq_deploy.quantization.data_free import weight_statistics
from epmq_deploy.quantization.expert_source import Experts, MergedAsExpert
from epmq_deploy.quantization.layer import LayerReport, quantize_layer, refit_bias
from epmq_deploy.quantization.layer_inputs import layer_inputs
from epmq_deploy.quantization.norms import NormSums, fit_affine, pre_affine
from epmq_deploy.quantization.quantized_model import QuantizedModel

log = logging.getLogger(__name__)

# Per task, a function that yields batches of model inputs.
TaskBatches = Mapping[str, Callable[[], Iterable[tuple[Tensor, ...]]]]


@dataclass
class _Task:
    """One task's batches on their way through student and expert."""

    name: str
    # By stream, batch by batch.
    tokens: list[dict[str, TokenWeights]] = field(default_factory=list)
    student: list[BlockBatch] = field(default_factory=list)
    expert: list[BlockBatch] = field(default_factory=list)
    # What the expert's current block showed, batch by batch.
    seen: list[dict[str, Kept]] = field(default_factory=list)
    # What the student's norm before the current group received, batch by batch.
    entered: list[Kept] = field(default_factory=list)


class Walk:
    """Takes calibration batches through a model block by block, quantizing on the way.

    Args:
        model: quantized in place.
        family: its family.
        target: the method.
        options: the method's options.
        experts: required by guided targets.
        rounding: quantize; otherwise layers get the target's weights in float32.
        probe: by layer, widths at which its error is measured besides.
        scratch: folder for activations on disk; the system's temporary folder when absent.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        target: QuantizationMethod[Any],
        options: QuantizeOptions,
        experts: Experts | None,
        *,
        rounding: bool = True,
        probe: Mapping[str, Collection[int]] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._model = model
        self._family = family
        self._target = target
        self._options = options
        self._guides = self._pick_guides(experts)
        self._rounding = rounding
        self._probe = probe or {}
        self._tasks: list[_Task] = []
        self._blocks: tuple[Block, ...] = ()
        self._batches: TaskBatches = {}
        self._streams: set[str] = set()
        # The one that batches are on their way through.
        self._stream: str | None = None
        self._result = QuantizedModel()
        # The norm just re-fitted, whose output is the input of the group that comes next.
        self._refitted: nn.Module | None = None
        self._device = next(model.parameters()).device
        self._cache = ActivationCache(getattr(options, "cache_bytes", None), scratch)
        self._cache_dtype = getattr(torch, getattr(options, "cache_dtype", "float32"))
        self._products = target.products_dtype(options)
        self._others = target.unpooled_weight(options)
        self._mix = target.mix(options)
        self._norm_mix = target.norm_mix(options)
        self._data_free = target.is_data_free(options)

    def _pick_guides(self, experts: Experts | None) -> Experts | None:
        if self._target.guide is Guide.MERGED:
            return MergedAsExpert(copy.deepcopy(self._model))
        return experts if self._target.guide is Guide.EXPERTS else None

    @property
    def _guide(self) -> Experts:
        assert self._guides is not None, f"{self._target.name} needs experts"
        return self._guides

    def start(self, blocks: tuple[Block, ...], batches: TaskBatches) -> None:
        """Say which blocks and batches there are; blocks must then come in this order."""
        self._blocks = blocks
        self._batches = batches
        self._streams = {block.stream for block in blocks}
        self._tasks = [_Task(name) for name in (self._guide.tasks if self._data_free else batches)]

    def _enter_stream(self, first: Block) -> None:
        """Where a block is the first of its stream, run everything before it.

        Blocks of earlier streams are finished, so that this one receives what they give then.
        """
        if self._data_free or first.stream == self._stream:
            return
        self._stream = first.stream
        ahead = [block.name for block in self._blocks[self._blocks.index(first) :]]
        for task in self._tasks:
            task.tokens, task.student, task.expert = [], [], []
            expert = self._guide.become(task.name, without=ahead) if self._mix else None
            for inputs in self._batches[task.name]():
                task.tokens.append(
                    {name: self._family.tokens(*inputs, stream=name) for name in self._streams}
                )
                task.student.append(self._enter(self._model, first, inputs))
                if expert is not None:
                    task.expert.append(self._enter(expert, first, inputs))

    def _enter(self, model: nn.Module, first: Block, inputs: tuple[Tensor, ...]) -> BlockBatch:
        placed = [value.to(self._device) for value in inputs]
        return capture_block_batch(
            model.get_submodule(first.name),
            lambda: self._family.embed(model, *placed),
            self._cache,
            self._cache_dtype,
            self._products,
        )

    def quantize_block(self, block: Block) -> QuantizedModel:
        """Quantize a block's layers in the order they run and go on to the next block."""
        self._enter_stream(block)
        self._result = QuantizedModel()
        self._run_experts(block)
        done: dict[str, nn.Module] = {}
        for group in block.groups:
            if group.norm is not None and self._norm_mix is not None:
                self._refit_norm(block, group.norm, group.pooled, done)
            self._quantize_group(block, group, done)
            self._forget_norm()
            done |= {name: _linear(self._model, name) for name in group.layers}
        if block.norm is not None and self._norm_mix is not None:
            self._refit_norm(block, block.norm, block.groups[-1].pooled, done)
        self._forget_norm()
        for task in self._tasks:
            task.seen.clear()
        self._advance_student(block, done)
        return self._result

    def _forget_norm(self) -> None:
        self._refitted = None
        for task in self._tasks:
            task.entered.clear()

    def skip_block(self, block: Block) -> None:
        """Go on to the next block; this one's weights are final."""
        self._enter_stream(block)
        for task in self._tasks:
            if task.expert:
                expert = self._guide.module(task.name, block.name)
                for batch in task.expert:
                    record(
                        expert,
                        batch,
                        {},
                        {},
                        self._cache,
                        self._cache_dtype,
                        passed_on=block.passes_on,
                    )
        self._advance_student(block, {})

    def _advance_student(self, block: Block, done: Mapping[str, nn.Module]) -> None:
        student = self._model.get_submodule(block.name)
        for task in self._tasks:
            for batch in task.student:
                advance(
                    student,
                    batch,
                    self._cache,
                    dtype=self._cache_dtype,
                    done=done,
                    passed_on=block.passes_on,
                )

    def _run_experts(self, block: Block) -> None:
        """Take every expert's batches through its block and keep what its layers answer."""
        norms = [group.norm for group in block.groups if group.norm] if self._norm_mix else []
        norms += [block.norm] if self._norm_mix and block.norm else []
        wanted = [name for name in block.layers if not self._options.skips(name)]
        for task in self._tasks:
            if not task.expert:
                continue
            expert = self._guide.module(task.name, block.name)

            def inside(name: str, expert: nn.Module = expert) -> nn.Module:
                return expert.get_submodule(name.removeprefix(f"{block.name}."))

            task.seen = [
                record(
                    expert,
                    batch,
                    {name: inside(name) for name in wanted},  # type: ignore[misc]
                    {name: inside(name) for name in norms},
                    self._cache,
                    self._cache_dtype,
                    # Products would round them to this anyway.
                    torch.bfloat16 if self._products == torch.bfloat16 else None,
                    block.passes_on,
                )
                for batch in task.expert
            ]

    def _token_weights(
        self, task: _Task, index: int, like: Tensor, stream: str, pooled: bool
    ) -> Tensor | None:
        others = self._others if pooled else 1.0
        return task.tokens[index][stream].weights(like.shape, others, like.device)

    def _refit_norm(
        self, block: Block, name: str, pooled: bool, done: Mapping[str, nn.Module]
    ) -> None:
        """Bring a norm's outputs closer to the experts', on the student's inputs."""
        norm = self._model.get_submodule(name)
        mix = self._norm_mix or 0.0
        student = self._model.get_submodule(block.name)
        gain = norm.get_parameter("weight")
        bias = dict(norm.named_parameters()).get("bias")
        sums = NormSums.zeros(gain.shape[0], gain.device)
        for task in self._tasks:
            expert_gain = self._guide.tensor(task.name, f"{name}.weight")
            expert_bias = None if bias is None else self._guide.tensor(task.name, f"{name}.bias")
            task_sums = NormSums.zeros(gain.shape[0], gain.device)
            for index, batch in enumerate(task.student):
                inputs = input_of(student, norm, batch, done, self._cache)
                task.entered.append(self._cache.keep(inputs))
                weights = self._token_weights(task, index, inputs, block.stream, pooled)
                own, token_weights = counted(pre_affine(norm, inputs), weights)
                wanted = own
                if mix and task.seen:
                    theirs, _ = counted(task.seen[index][name].peek(), weights)
                    wanted = torch.lerp(own, theirs.to(own.dtype), mix)
                wanted = wanted * expert_gain
                task_sums.add(
                    own, wanted if expert_bias is None else wanted + expert_bias, token_weights
                )
            sums.add_mean(task_sums)
        self._apply_norm(name, norm, sums, gain, bias)
        self._refitted = norm

    def _apply_norm(
        self, name: str, norm: nn.Module, sums: NormSums, gain: Tensor, bias: Tensor | None
    ) -> None:
        damping = self._target.norm_damping(self._options)
        new_gain, new_bias = fit_affine(sums, gain, bias, damping)
        before, after = sums.error(gain, bias), sums.error(new_gain, new_bias)
        norm.get_parameter("weight").data = new_gain
        self._result.replaced[f"{name}.weight"] = new_gain.cpu()
        if new_bias is not None:
            norm.get_parameter("bias").data = new_bias
            self._result.replaced[f"{name}.bias"] = new_bias.cpu()
        self._result.reports.append(
            LayerReport(name, "refitted", error_before=before, error_after=after)
        )

    def _quantize_group(self, block: Block, group: Group, done: Mapping[str, nn.Module]) -> None:
        """Quantize layers that share an input."""
        names = [name for name in group.layers if not self._options.skips(name)]
        if not names:
            return
        sums = self._sums(block, group, names, done)
        hessian = self._target.hessian(sums, self._options)
        for name in names:
            layer = _linear(self._model, name)
            problem = self._target.problem(self._weights(name, layer), sums, hessian, self._options)
            options = self._options.for_layer(name)
            for bits in self._probe.get(name, ()):
                probed = options.model_copy(update={"bits": bits, "refine": 0})
                report = quantize_layer(name, None, problem, sums, probed).report
                self._result.errors.setdefault(name, {})[bits] = report.error_after
            if self._rounding:
                solved = quantize_layer(name, layer.bias, problem, sums, options)
                self._result.layers[name] = solved.linear
                self._result.reports.append(solved.report)
                if solved.report.reason:
                    log.warning("%s: %s (%s)", name, solved.report.status, solved.report.reason)
                weight, bias = solved.linear.dequantize(), solved.bias
                if (seen := layer_inputs(sums, weight)) is not None:
                    self._result.inputs[name] = seen
            else:
                weight = problem.weight.to(torch.float32).contiguous()
                bias = refit_bias(name, layer.bias, problem.weight, problem, sums, options)
            self._apply(name, layer, weight, bias)

    def _sums(
        self, block: Block, group: Group, names: list[str], done: Mapping[str, nn.Module]
    ) -> GroupSums:
        """Sum statistics over tasks, holding one task's Gram matrix at a time."""
        first = _linear(self._model, names[0])
        sums = GroupSums.zeros(first.in_features, first.weight.device)
        for task in self._tasks:
            try:
                statistics = self._statistics(block, group, names, task, done)
            except NumericsError as error:
                raise NumericsError(f"layer {names[0]}: task {task.name!r}: {error}") from error
            biases = {}
            if self._guides:
                biases = {
                    name: self._guide.tensor(task.name, f"{name}.bias")
                    for name in names
                    if _linear(self._model, name).bias is not None
                }
            sums.add(statistics, self._target.task_weight(statistics, self._options), biases)
        if 0 < sums.tokens < 2 * first.in_features:
            log.warning(
                "%s: %d calibration tokens for %d input columns; at least %d are advisable, "
                "add samples",
                names[0],
                sums.tokens,
                first.in_features,
                2 * first.in_features,
            )
        return sums

    def _statistics(
        self,
        block: Block,
        group: Group,
        names: list[str],
        task: _Task,
        done: Mapping[str, nn.Module],
    ) -> TaskStatistics:
        student = self._model.get_submodule(block.name)
        first = _linear(self._model, names[0])
        if self._data_free:
            own = {name: self._guide.tensor(task.name, f"{name}.weight") for name in names}
            bases = {name: self._guide.base_tensor(f"{name}.weight") for name in names}
            return weight_statistics(own, bases)
        guides: dict[str, Tensor | None] = dict.fromkeys(names) if self._guides else {}
        if self._guides and self._mix < 1:
            guides = {name: self._guide.tensor(task.name, f"{name}.weight") for name in names}
        accumulator = Accumulator(self._products)
        stream = block.stream if group.stream is None else group.stream
        for index, batch in enumerate(task.student):
            if self._refitted is None:
                inputs = input_of(student, first, batch, done, self._cache)
            else:
                with torch.inference_mode():
                    inputs = self._refitted(task.entered[index].value())
            features = {name: task.seen[index][name].peek() for name in names if task.seen}
            accumulator.add(
                inputs,
                self._token_weights(task, index, inputs, stream, group.pooled),
                guides,
                features,
                self._mix,
            )
        return accumulator.statistics()

    def _weights(self, name: str, layer: nn.Linear) -> LayerWeights:
        if not self._guides:
            return LayerWeights(name, layer.weight, layer.bias)
        base = self._guide.base_tensor(f"{name}.weight")
        base_bias = None if layer.bias is None else self._guide.base_tensor(f"{name}.bias")
        return LayerWeights(name, layer.weight, layer.bias, base, base_bias)

    def _apply(self, name: str, layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
        layer.weight.data = weight.to(layer.weight.device)
        if bias is not None:
            layer.bias.data = bias
            self._result.replaced[f"{name}.bias"] = bias.cpu()


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear), "families list linear layers only"
    return layer
