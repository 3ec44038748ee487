"""The budget of bits for a model's layers, and what each layer takes at every width."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from epmq_deploy.errors import RecipeError
from epmq_deploy.models import Block
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.embeddings import planned_outside_blocks

_MEGABYTE = 8e6
_WIDTHS = (4, 8)
_NARROW_WIDTHS = (2, 3, 4, 8)

Sizes = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class BitBudget:
    """The budget of the layers in the blocks.

    Attributes:
        bits: of all of them.
        sizes: bits by layer and width; one width for layers whose bits are fixed.
        weights: number of weights by layer.
    """

    bits: float
    sizes: Sizes
    weights: Mapping[str, int]

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """Widths of the layers whose width is not fixed."""
        return {name: tuple(sizes) for name, sizes in self.sizes.items() if len(sizes) > 1}


def bit_budget(model: nn.Module, blocks: tuple[Block, ...], options: QuantizeOptions) -> BitBudget:
    """Return the budget that ``target_bits`` or ``target_size`` allows; runs no calibration.

    Args:
        model: the merged model.
        blocks: its blocks.
        options: with one of the two.

    Raises:
        RecipeError: even the smallest widths take more, or every layer has a fixed width.
    """
    inside = [name for block in blocks for name in block.layers]
    layers = [name for name in inside if not options.skips(name)]
    by_size = options.target_bits is None
    option = "quantize.target_size" if by_size else "quantize.target_bits"
    if all(options.fixed_bits(name) for name in layers):
        raise RecipeError(
            f"{option}: there are no bits to choose, as every layer in the blocks is skipped or "
            "has its bits given in quantize.layers; leave this option out"
        )
    weights = {name: model.get_parameter(f"{name}.weight").numel() for name in layers}
    asked = options.target_size if by_size else options.target_bits
    if asked is None:
        raise ValueError("neither target_bits nor target_size is given")
    unit = _MEGABYTE if by_size else float(sum(weights.values()))
    taken = _bits_outside_blocks(model, set(inside), options) if by_size else 0.0
    budget = asked * unit - taken
    sizes = _sizes(model, layers, options, _WIDTHS)
    if not by_size and _least(sizes) > budget:
        # Below 4 bits ONNX stores codes in 4-bit containers, so narrower codes save nothing there;
        # they are only chosen where the target asks for less than 4 bits.
        sizes = _sizes(model, layers, options, _NARROW_WIDTHS)
    if _least(sizes) > budget:
        least = _rounded_up((_least(sizes) + taken) / unit)
        raise RecipeError(
            f"{option} cannot be met: {asked:g} {'MB' if by_size else 'bits'} asked for, but with "
            f"the other options at least {least:g} are needed"
        )
    return BitBudget(budget, sizes, weights)


def _sizes(
    model: nn.Module, layers: list[str], options: QuantizeOptions, widths: tuple[int, ...]
) -> Sizes:
    """Return bits by layer and width, with scales and zero points where the target is a size."""

    def size(name: str, bits: int) -> float:
        rows, columns = model.get_parameter(f"{name}.weight").shape
        if options.target_bits is not None:
            return float(rows * columns * bits)
        return stored_bits(rows, columns, bits, options.for_layer(name).group_size)

    fixed = {name: options.fixed_bits(name) for name in layers}
    return {
        name: {width: size(name, width) for width in ((bits,) if bits else widths)}
        for name, bits in fixed.items()
    }


def _least(sizes: Sizes) -> float:
    return sum(min(choice.values()) for choice in sizes.values())


def _bits_outside_blocks(model: nn.Module, inside: set[str], options: QuantizeOptions) -> float:
    """Return the bits of the quantized layers outside the blocks."""
    total = 0.0
    for name, grid in planned_outside_blocks(model, inside, options).items():
        rows, columns = model.get_parameter(f"{name}.weight").flatten(1).shape
        total += stored_bits(rows, columns, grid.bits, grid.group_size)
    return total


def _rounded_up(value: float) -> float:
    """Round up to four digits, so that the suggested value is feasible."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / step) * step


def stored_bits(rows: int, columns: int, bits: int, group_size: int) -> float:
    """Return the bits of a quantized weight: codes, float32 scales and zero points.

    Args:
        rows: ``N`` of the weight ``[N, K]``.
        columns: ``K``.
        bits: width of codes and zero points.
        group_size: columns per scale, or -1 for all.
    """
    groups = 1 if group_size == -1 else -(-columns // group_size)
    return rows * (columns * bits + groups * (32 + bits))
