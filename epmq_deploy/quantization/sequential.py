"""Quantizing a model block by block, in the order its layers run."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from epmq_deploy.calibration.activations import input_of
from epmq_deploy.calibration.block_runner import (
    BlockRunner,
    ModuleSource,
    SameForAllTasks,
    TaskBatches,
)
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import Block, Group, ModelFamily
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.base import QuantizationMethod
from epmq_deploy.quantization.embeddings import is_quantizable, quantize_outside_blocks
from epmq_deploy.quantization.expert_features import ExpertRecorder, Features
from epmq_deploy.quantization.expert_source import ExpertSource
from epmq_deploy.quantization.group import GroupQuantizer
from epmq_deploy.quantization.group_statistics import (
    ActivationStatistics,
    GroupInputs,
    GroupStatistics,
    StatisticsSource,
    WeightStatistics,
)
from epmq_deploy.quantization.guidance import Gradients
from epmq_deploy.quantization.norms import NormRefit, RefittedNorm
from epmq_deploy.quantization.residuals.fitting import ResidualFitter, ResidualSettings
from epmq_deploy.quantization.residuals.student import TaskStudents
from epmq_deploy.quantization.results import LayerReport, QuantizedLinear, QuantizedModel


class FinishedBlocks(Protocol):
    """Blocks that an interrupted run has finished."""

    def load(self, index: int) -> QuantizedModel | None:
        """Return a block's result, or None when it is still to be done."""
        ...

    def save(self, index: int, result: QuantizedModel) -> None:
        """Remember a block's result."""
        ...


class BlockQuantizer:
    """Quantizes a model in place, one block at a time.

    Args:
        model: the merged model.
        family: its family.
        blocks: its blocks; they are quantized or skipped in this order.
        method: the method.
        options: the method's options.
        batches: per task, a function that yields batches of model inputs.
        experts: base and experts, for methods that use them.
        rounding: quantize; otherwise layers get the method's weights in float32.
        probe: by layer, widths in bits at which its error is measured in addition.
        scratch: folder for activations on disk; default: the system's temporary folder.
        gradients: of the samples, for methods whose token weights they guide.
        residuals: how layers are corrected for every task; None for not at all.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        blocks: Sequence[Block],
        method: QuantizationMethod[Any],
        options: QuantizeOptions,
        batches: TaskBatches,
        experts: ExpertSource | None,
        *,
        rounding: bool = True,
        probe: Mapping[str, Collection[int]] | None = None,
        scratch: Path | None = None,
        gradients: Gradients | None = None,
        residuals: ResidualSettings | None = None,
    ) -> None:
        self._model, self._options = model, options
        settings = method.calibration(options)
        self._cache = ActivationCache(settings.cache_bytes, scratch)
        source = method.expert_source(model, experts)
        running = source if settings.mix else None
        self.students = TaskStudents(model)
        self._student: ModuleSource = self.students if residuals else SameForAllTasks(model)
        self._fitter: ResidualFitter | None = None
        if residuals and source is not None:
            self._fitter = ResidualFitter(model, self.students, source, self._cache, residuals)
        self._runner = BlockRunner(
            family,
            blocks,
            {} if method.is_data_free(options) else batches,
            self._student,
            experts=running,
            cache=self._cache,
            device=next(model.parameters()).device,
            dtype=settings.cache_dtype,
            products=settings.products,
        )
        self._recorder = ExpertRecorder(self._runner, running, self._cache, settings)
        self._norms: NormRefit | None = None
        if settings.norm_mix is not None and source is not None:
            self._norms = NormRefit(
                model, self._student, self._runner, source, self._cache, settings
            )
        statistics: StatisticsSource = ActivationStatistics(
            self._runner, source, settings, gradients
        )
        if method.is_data_free(options) and source is not None:
            statistics = WeightStatistics(source)
        self._statistics = GroupStatistics(model, statistics, source, method, options)
        self._groups = GroupQuantizer(
            model, method, options, source, rounding=rounding, probe=probe
        )

    def quantize(self, block: Block) -> QuantizedModel:
        """Quantize a block's layers in the order they run, and go on to the next block.

        Raises:
            NumericsError: a layer could not be solved as asked; names it.
        """
        self._runner.enter(block)
        result = self._quantize_layers(block)
        self._runner.advance(block, self._layers(block.layers))
        return result

    def skip(self, block: Block) -> None:
        """Go on to the next block; the weights of this one are final."""
        self._runner.enter(block)
        self._runner.advance_experts(block)
        self._runner.advance(block)

    def _quantize_layers(self, block: Block) -> QuantizedModel:
        layers, norms = self._quantized(block.layers), self._norms_of(block)
        features = self._recorder.record(block, layers, norms)
        result = QuantizedModel()
        done: dict[str, nn.Module] = {}
        for group in block.groups:
            self._quantize_group(block, group, features, done, result)
            done |= self._layers(group.layers)
        self._refit(block, block.norm, block.groups[-1].pooled, features, done, result)
        return result

    def _quantize_group(
        self,
        block: Block,
        group: Group,
        features: Features,
        done: Mapping[str, nn.Module],
        result: QuantizedModel,
    ) -> None:
        """Re-fit the norm before a group, quantize its layers, and add both to the result."""
        norm = self._refit(block, group.norm, group.pooled, features, done, result)
        names = self._quantized(group.layers)
        if not names:
            return
        inputs = GroupInputs(
            names,
            block.stream_of(group),
            group.pooled,
            norm.output
            if norm and group.runs == 1
            else self._input_of(block, names[0], done, group.runs),
            features,
            group.runs,
        )
        keep = None if self._fitter is None else self._fitter.keep
        result.extend(self._groups.quantize(names, self._statistics.sums(inputs, keep)))
        if self._fitter is not None:
            result.residuals = result.residuals.joined(self._fitter.correct(names))

    def _refit(
        self,
        block: Block,
        name: str | None,
        pooled: bool,
        features: Features,
        done: Mapping[str, nn.Module],
        result: QuantizedModel,
    ) -> RefittedNorm | None:
        """Re-fit a norm, if there is one and the method does, and add it to the result."""
        if name is None or self._norms is None:
            return None
        norm = self._norms.refit(block, name, features, pooled=pooled, done=done)
        result.replaced |= norm.parameters
        result.reports.append(
            LayerReport(
                name, "refitted", error_before=norm.error_before, error_after=norm.error_after
            )
        )
        return norm

    def _input_of(
        self, block: Block, name: str, done: Mapping[str, nn.Module], runs: int
    ) -> Callable[[str, int], Tensor]:
        """Return a function for what a layer receives with all earlier layers quantized."""
        layer = linear_layer(self._model, name)

        def received(task: str, index: int) -> Tensor:
            student = self._student.module(task, block.name)
            batch = self._runner.batches[task][index].student
            return input_of(student, layer, batch, done, self._cache, runs)

        return received

    def _quantized(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not self._options.skips(name)]

    def _layers(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: linear_layer(self._model, name) for name in names}

    def _norms_of(self, block: Block) -> list[str]:
        """Names of the norms of a block that are re-fitted."""
        norms = [*(group.norm for group in block.groups), block.norm]
        return [norm for norm in norms if norm] if self._norms else []


def quantize_model(
    model: nn.Module,
    family: ModelFamily,
    method: QuantizationMethod[Any],
    options: QuantizeOptions,
    *,
    batches: TaskBatches,
    experts: ExpertSource | None = None,
    rounding: bool = True,
    probe: Mapping[str, Collection[int]] | None = None,
    finished: FinishedBlocks | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
    gradients: Gradients | None = None,
    residuals: ResidualSettings | None = None,
) -> QuantizedModel:
    """Quantize ``model`` in place (its weights become the dequantized ones).

    True sequential: the inputs of every layer are gathered with all earlier layers already
    quantized; layers that share an input share one Gram matrix. Experts are read one layer or
    block at a time.

    Args:
        model: the merged model, on the device to work on.
        family: its family.
        method: the method.
        options: the method's options.
        batches: per task, a function that yields batches of model inputs.
        experts: base and experts, for methods that use them.
        rounding: quantize; otherwise layers get the method's own weights, unrounded, to tell what
            the method gives from what rounding costs.
        probe: by layer, widths in bits at which its error is measured in addition.
        finished: results of blocks done before; further ones are added to it.
        progress: shows one step per block.
        scratch: folder for activations on disk; default: the system's temporary folder.
        gradients: of the samples, for methods whose token weights they guide.
        residuals: how layers are corrected for every task; None for not at all.

    Raises:
        NumericsError: a layer could not be solved as asked; names it.
    """
    progress = progress or NoProgress()
    blocks = family.blocks(model)
    check_patterns(model, blocks, options)
    inside = {name for block in blocks for name in block.layers}
    whole = QuantizedModel()
    if rounding:
        # First, so that calibration sees the inputs that the blocks will receive.
        layers, reports = quantize_outside_blocks(model, inside, options)
        whole.extend(QuantizedModel(layers, reports=reports))
    quantizer = BlockQuantizer(
        model,
        family,
        blocks,
        method,
        options,
        batches,
        experts,
        rounding=rounding,
        probe=probe,
        scratch=scratch,
        gradients=gradients,
        residuals=residuals,
    )
    for index, block in enumerate(progress.track(blocks, "quantizing")):
        result = finished.load(index) if finished else None
        if result is not None:
            apply_quantized(model, result.layers, result.replaced)
            quantizer.students.add(result.residuals)
            quantizer.skip(block)
        else:
            result = quantizer.quantize(block)
            if finished:
                finished.save(index, result)
        whole.extend(result)
    quantizer.students.share()
    whole.reports += [
        LayerReport(name, "kept", "skipped by option")
        for name in sorted(inside)
        if options.skips(name)
    ]
    return whole


def check_patterns(model: nn.Module, blocks: tuple[Block, ...], options: QuantizeOptions) -> None:
    """Make sure patterns of ``skip`` name layers, and those of ``layers`` layers in blocks.

    Raises:
        RecipeError: names the patterns that match nothing, or nothing that takes such options.
    """
    inside = [name for block in blocks for name in block.layers]
    every = [name for name, module in model.named_modules() if is_quantizable(module)]
    nowhere = {"skip": _unmatched(options.skip, every), "layers": _unmatched(options.layers, every)}
    outside = [key for key in _unmatched(options.layers, inside) if key not in nowhere["layers"]]
    problems = []
    if idle := [f"quantize.{option}: {key}" for option, keys in nowhere.items() for key in keys]:
        problems.append(f"{', '.join(idle)} matches no layer; layers are named like {inside[0]}")
    if outside:
        problems.append(
            f"quantize.layers: {', '.join(outside)} matches no layer in the blocks; layers outside "
            "always have 8 bits, unless quantize.skip names them or quantize.outer is false"
        )
    if problems:
        raise RecipeError("; ".join(problems))


def _unmatched(patterns: Iterable[str], names: list[str]) -> list[str]:
    """Return the patterns that match none of these names."""
    return [key for key in patterns if not any(fnmatchcase(name, key) for name in names)]


def apply_quantized(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], replaced: Mapping[str, Tensor]
) -> None:
    """Give ``model`` the dequantized weights and replaced parameters, in place."""
    for name, linear in layers.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.data = linear.dequantize().reshape(weight.shape).to(weight)
    for name, value in replaced.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter)
