"""Quantizing a model block by block, in the order its layers run."""

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from epmq_deploy.errors import RecipeError
from epmq_deploy.models import Block, ModelFamily
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.base import QuantizationMethod
from epmq_deploy.quantization.embeddings import is_quantizable, quantize_outer
from epmq_deploy.quantization.expert_source import Experts
from epmq_deploy.quantization.layer import LayerReport
from epmq_deploy.quantization.quantized_linear import QuantizedLinear
from epmq_deploy.quantization.quantized_model import QuantizedModel
from epmq_deploy.quantization.walk import TaskBatches, Walk


class Finished(Protocol):
    """Blocks that an interrupted run has finished."""

    def load(self, index: int) -> QuantizedModel | None:
        """A block's result, or None when it is still to be done."""
        ...

    def save(self, index: int, result: QuantizedModel) -> None:
        """Remember a block's result."""
        ...


def quantize_model(
    model: nn.Module,
    family: ModelFamily,
    target: QuantizationMethod[Any],
    options: QuantizeOptions,
    *,
    batches: TaskBatches,
    experts: Experts | None = None,
    rounding: bool = True,
    probe: Mapping[str, Collection[int]] | None = None,
    finished: Finished | None = None,
    progress: Progress | None = None,
    scratch: Path | None = None,
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
        rounding: quantize; otherwise layers get the target's own weights, unrounded, to tell what
            the target gives from what rounding costs.
        probe: by layer, widths in bits at which its error is measured besides.
        finished: results of blocks done before; further ones are added to it.
        progress: shows one step per block.
        scratch: folder for activations on disk; the system's temporary folder when absent.

    Raises:
        NumericsError: a layer could not be solved as asked; names it.
    """
    progress = progress or NoProgress()
    blocks = family.blocks(model)
    check_patterns(model, blocks, options)
    inside = {name for block in blocks for name in block.layers}
    whole = QuantizedModel()
    if rounding:
        # First, so that calibration sees what the blocks will receive.
        layers, reports = quantize_outer(model, inside, options)
        whole.extend(QuantizedModel(layers, reports=reports))
    walk = Walk(
        model, family, target, options, experts, rounding=rounding, probe=probe, scratch=scratch
    )
    walk.start(blocks, batches)
    for index, block in enumerate(progress.track(blocks, "quantizing")):
        result = finished.load(index) if finished else None
        if result is not None:
            apply_quantized(model, result.layers, result.replaced)
            walk.skip_block(block)
        else:
            result = walk.quantize_block(block)
            if finished:
                finished.save(index, result)
        whole.extend(result)
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
            f"quantize.layers: {', '.join(outside)} matches no layer in the blocks; those outside "
            "always take 8 bits, or are left unquantized by name with quantize.skip (--skip), all "
            "of them with quantize.outer: false (--no-outer)"
        )
    if problems:
        raise RecipeError("; ".join(problems))


def _unmatched(patterns: Iterable[str], names: list[str]) -> list[str]:
    """The patterns that match none of these names."""
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
