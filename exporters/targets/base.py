"""What a deployment target is: formats, what its kernels take, and why."""

from dataclasses import asdict, dataclass
from typing import Any

from epmq_deploy.exporters.packing.packed_linear import container_bits
from epmq_deploy.exporters.targets.layer_grid import LayerGrid


@dataclass(frozen=True)
class WebRuntime:
    """The build of onnxruntime-web that runs a browser target's graphs.

    Attributes:
        module: file that a page imports.
        binary: stem of the ``.mjs`` and ``.wasm`` files that the module loads.
    """

    module: str
    binary: str


@dataclass(frozen=True)
class Target:
    """A device profile.

    Its constraints hold for the linear layers of its low-bit formats. What could not be verified,
    because no such device was available, is said in ``unverified`` rather than made a constraint.

    Attributes:
        name: what recipes call it.
        formats: to write, best first.
        why: these formats and constraints, one sentence each.
        widths: bits of containers its kernels take; codes of 3 bits are stored in 4.
        blocks: block sizes its kernels take; any when empty.
        whole_blocks: whether blocks must divide a layer's inputs.
        symmetric: whether zero points are refused.
        two_bit_containers: whether its kernels take 2-bit codes in 2 bits.
        unverified: what is not known for sure, because no such device was available.
        web: what a page runs its graphs with; None if it is no browser.
    """

    name: str
    formats: tuple[str, ...]
    why: str
    widths: tuple[int, ...] = (4, 8)
    blocks: tuple[int, ...] = ()
    whole_blocks: bool = False
    symmetric: bool = False
    two_bit_containers: bool = False
    unverified: str = ""
    web: WebRuntime | None = None

    def recorded(self) -> dict[str, Any]:
        """Return what an export's manifest says of it: all but what a page runs it with."""
        attributes = asdict(self)
        del attributes["web"]
        return attributes

    def refuses_width(self, grid: LayerGrid) -> bool:
        """Whether codes are stored in more bits than its kernels take."""
        return container_bits(grid.bits) not in self.widths

    def refuses_block(self, grid: LayerGrid) -> bool:
        """Whether its kernels take no blocks of that size."""
        # What has no block size is refused when it is packed.
        return bool(self.blocks and grid.block_size) and grid.block_size not in self.blocks

    def refuses_tail(self, grid: LayerGrid) -> bool:
        """Whether the last block would have to be full."""
        return self.whole_blocks and bool(grid.block_size and grid.in_features % grid.block_size)

    def refuses_zero_points(self, grid: LayerGrid) -> bool:
        """Whether there would have to be no zero points."""
        return self.symmetric and not grid.symmetric

    def refuses(self, grid: LayerGrid) -> bool:
        """Whether a layer cannot run there, for any reason."""
        return (
            self.refuses_width(grid)
            or self.refuses_block(grid)
            or self.refuses_tail(grid)
            or self.refuses_zero_points(grid)
        )
