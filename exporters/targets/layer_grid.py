"""How linear layers are stored, or will be, as far as a target's kernels depend on it."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from epmq_deploy.exporters.packing.packed_linear import block_size_for, container_bits
from epmq_deploy.models import Block
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.embeddings import planned_outside_blocks
from epmq_deploy.quantization.results import QuantizedLinear


@dataclass(frozen=True)
class LayerGrid:
    """What a target's kernels ask about a linear layer.

    Attributes:
        bits: per code.
        block_size: columns that share a scale in the file; None where no file can hold it.
        in_features: ``K``.
        symmetric: whether it is stored without zero points; those of symmetric codes of 2 and 3
            bits are not the default of their containers of 4.
        outer: whether it lies outside the blocks, where it has 8 bits whatever the options say.
    """

    bits: int
    block_size: int | None
    in_features: int
    symmetric: bool
    outer: bool = False

    @classmethod
    def of(cls, layer: QuantizedLinear, *, outer: bool = False) -> "LayerGrid":
        """Return the grid for a quantized layer."""
        return cls.stored(layer.bits, layer.group_size, layer.symmetric, layer.in_features, outer)

    @classmethod
    def stored(
        cls, bits: int, group_size: int, symmetric: bool, columns: int, outer: bool
    ) -> "LayerGrid":
        """Return the grid of a layer of ``columns`` inputs; groups of -1 are whole rows."""
        block = block_size_for(columns if group_size == -1 else group_size, columns)
        return cls(bits, block, columns, symmetric and bits == container_bits(bits), outer)

    def with_options(self, bits: int, options: QuantizeOptions) -> "LayerGrid":
        """Return the grid for the same layer with so many bits and other options."""
        return self.stored(
            bits, options.group_size, options.symmetric, self.in_features, self.outer
        )


def planned_grids(
    model: nn.Module, blocks: Iterable[Block], options: QuantizeOptions
) -> dict[str, LayerGrid]:
    """Return what quantization will make of linear layers.

    Of those inside the blocks nothing is known where bits are chosen for a budget.
    """
    inside = {name for block in blocks for name in block.layers}
    grids = {}
    for name, planned in planned_outside_blocks(model, inside, options).items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            grids[name] = LayerGrid.stored(
                planned.bits, planned.group_size, planned.symmetric, layer.in_features, True
            )
    if options.target_bits is not None or options.target_size is not None:
        return grids
    for name in sorted(inside):
        if not options.skips(name):
            chosen = options.for_layer(name)
            columns = model.get_parameter(f"{name}.weight").shape[1]
            grids[name] = LayerGrid.stored(
                chosen.bits, chosen.group_size, chosen.symmetric, columns, False
            )
    return grids
