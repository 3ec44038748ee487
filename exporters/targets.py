"""Where a model is to run: which formats suit it, what its kernels take, and why.

A target's constraints hold for the linear layers of its low-bit formats. What could not be verified
for want of the device is said in ``unverified`` rather than turned into a constraint.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from epmq_deploy.calibration.options import QuantizeOptions
from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.packed_linear import block_size_for, container_bits
from epmq_deploy.models import Block
from epmq_deploy.quantization.quantized_linear import QuantizedLinear
from epmq_deploy.recipe import ExportOptions

DEFAULT_FORMATS = ("matmulnbits", "qdq")


@dataclass(frozen=True)
class LayerGrid:
    """What a target's kernels ask about a linear layer.

    Attributes:
        bits: per code.
        block_size: columns that share a scale in the file; None where no file can hold it.
        in_features: ``K``.
        symmetric: whether it is stored without zero points; those of symmetric codes of 2 and 3
            bits are not the default of their containers of 4.
    """

    bits: int
    block_size: int | None
    in_features: int
    symmetric: bool

    @classmethod
    def of(cls, layer: QuantizedLinear) -> "LayerGrid":
        """That of a quantized layer."""
        block = block_size_for(layer.group_size, layer.in_features)
        return cls(layer.bits, block, layer.in_features, _centred(layer.bits, layer.symmetric))


@dataclass(frozen=True)
class Target:
    """One place to run.

    Attributes:
        name: what recipes call it.
        formats: to write, best first.
        why: these formats and constraints, one sentence each.
        widths: bits of containers its kernels take; codes of 3 bits are stored in 4.
        blocks: block sizes its kernels take; any when empty.
        whole_blocks: whether blocks must divide a layer's inputs.
        symmetric: whether zero points are refused.
        two_bit_containers: whether its kernels take 2-bit codes in 2 bits.
        unverified: what is not known for sure, for want of the device.
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

    def problems(self, layers: Mapping[str, LayerGrid]) -> list[str]:
        """What keeps layers from running there, one sentence per kind, with what to change."""
        found = []
        widths = _either(self.widths)
        wide = [name for name, grid in layers.items() if self._too_wide(grid)]
        if wide:
            found.append(
                f"{_named(wide)} stored in 8 bits, it takes {widths}: quantize with --bits "
                f"{max(self.widths)}, or leave them in float with --skip"
            )
        sizes = [name for name, grid in layers.items() if self._other_block(grid)]
        if sizes:
            found.append(
                f"{_named(sizes)} stored in blocks of {_blocks(sizes, layers)}, it takes "
                f"{_either(self.blocks)}: quantize with --group-size {self.blocks[-1]}"
            )
        ragged = [name for name, grid in layers.items() if self._ragged(grid)]
        if ragged:
            found.append(
                f"{_named(ragged)} stored in blocks of {_blocks(ragged, layers)}, which do not "
                f"divide {_inputs(ragged, layers)} inputs: quantize with a --group-size that does"
            )
        shifted = [name for name, grid in layers.items() if self.symmetric and not grid.symmetric]
        if shifted:
            found.append(
                f"{_named(shifted)} stored with zero points, it takes none: quantize with "
                f"--symmetric --bits {max(self.widths)}"
            )
        return [f"target {self.name}: {text}" for text in found]

    def _too_wide(self, grid: LayerGrid) -> bool:
        return container_bits(grid.bits) not in self.widths

    def _other_block(self, grid: LayerGrid) -> bool:
        # What has no block size is refused when it is packed.
        return bool(self.blocks and grid.block_size) and grid.block_size not in self.blocks

    def _ragged(self, grid: LayerGrid) -> bool:
        return self.whole_blocks and bool(grid.block_size and grid.in_features % grid.block_size)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "cpu",
            ("int8-expand", "matmulnbits"),
            "int8-expand multiplies in int8, the fastest way on x86 and ARM processors; "
            "matmulnbits stays in float32, for models whose accuracy int8 activations cost.",
            two_bit_containers=True,
        ),
        Target(
            "cuda",
            ("matmulnbits", "fp16"),
            "onnxruntime's CUDA kernel for MatMulNBits takes 4 and 8 bits; fp16 is the reference "
            "for its speed.",
            unverified="read in onnxruntime's sources; fast paths need float16 activations.",
        ),
        Target(
            "tensorrt",
            ("qdq",),
            "TensorRT reads standard DequantizeLinear: INT4 weights in blocks of 64 or 128 without "
            "zero points (its documentation of quantization schemes); it has no blocked INT8.",
            widths=(4,),
            blocks=(64, 128),
            symmetric=True,
            unverified="no engine was built here; the documentation does not say whether blocks "
            "may fail to divide a layer's inputs.",
        ),
        Target(
            "openvino",
            ("qdq",),
            "OpenVINO reads standard DequantizeLinear in 4 and 8 bits, with and without zero "
            "points, but only blocks that divide a layer's inputs (measured with 2026.4 on CPU).",
            whole_blocks=True,
            unverified="its GPU and NPU plugins; the CPU plugin quantizes activations to int8 "
            "unless DYNAMIC_QUANTIZATION_GROUP_SIZE is 0, so evaluate there.",
        ),
        Target(
            "qnn",
            ("matmulnbits",),
            "the QNN provider translates 4-bit MatMulNBits to its block-quantized operators; "
            "blocked DequantizeLinear runs on the processor instead (onnxruntime-qnn issue 650).",
            widths=(4,),
            symmetric=True,
            unverified="no device was at hand: which QAIRT versions and backends take it. Shapes "
            "must be fixed first, with onnxruntime.tools.make_dynamic_shape_fixed.",
        ),
        Target(
            "webgpu",
            ("matmulnbits", "fp16"),
            "onnxruntime-web has WebGPU kernels for MatMulNBits of 2, 4 and 8 bits, blocks of 16 "
            "to 256, with and without zero points (measured with 1.30 on a software adapter); they "
            "refuse g_idx, which is never written.",
            two_bit_containers=True,
            unverified="GPUs; older versions of onnxruntime-web take 4 bits only.",
        ),
        Target(
            "wasm",
            ("int8-expand",),
            "in WebAssembly MatMulNBits unpacks its weights on every run; int8-expand does so once "
            "and multiplies in int8.",
        ),
    )
}


def planned_grids(
    model: nn.Module, blocks: Iterable[Block], options: QuantizeOptions
) -> dict[str, LayerGrid]:
    """What quantization will make of the layers inside the blocks.

    Layers outside them, and bits that are chosen for a budget, are known only afterwards.
    """
    if options.target_bits is not None or options.target_size is not None:
        return {}
    names = [name for block in blocks for name in block.layers if not options.skips(name)]
    return {name: _planned(model.get_submodule(name), options.for_layer(name)) for name in names}


def _planned(layer: nn.Module, options: QuantizeOptions) -> LayerGrid:
    columns = layer.get_parameter("weight").shape[1]
    group = columns if options.group_size == -1 else options.group_size
    centred = _centred(options.bits, options.symmetric)
    return LayerGrid(options.bits, block_size_for(group, columns), columns, centred)


def _centred(bits: int, symmetric: bool) -> bool:
    return symmetric and bits == container_bits(bits)


def target_of(name: str) -> Target:
    """The target of a name.

    Raises:
        RecipeError: there is none.
    """
    if name not in TARGETS:
        raise RecipeError(f"unknown export target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def chosen_formats(options: ExportOptions) -> tuple[str, ...]:
    """The formats given, else the target's, else MatMulNBits and QDQ.

    Raises:
        RecipeError: no such target.
    """
    if options.formats is not None:
        return options.formats
    return DEFAULT_FORMATS if options.target is None else target_of(options.target).formats


def chosen_two_bit_containers(options: ExportOptions) -> bool | None:
    """``two_bit_containers`` as the target allows it.

    Raises:
        RecipeError: no such target, or it has no kernel for what was asked for.
    """
    if options.target is None or target_of(options.target).two_bit_containers:
        return options.two_bit_containers
    if options.two_bit_containers:
        raise RecipeError(
            f"target {options.target}: its kernels take no 2-bit containers; export with "
            "--no-two-bit-containers"
        )
    return False


def check_export(options: ExportOptions) -> None:
    """Make sure that target and formats exist, before there are layers to look at.

    Raises:
        RecipeError: one does not, or the target has no kernel for what was asked for.
    """
    formats_of(chosen_formats(options))
    chosen_two_bit_containers(options)


def check_target(options: ExportOptions, layers: Mapping[str, LayerGrid]) -> None:
    """Make sure that a target can run quantized linear layers.

    Raises:
        RecipeError: no such target, or layers it cannot run; names what to change.
    """
    if options.target is None:
        return
    if not any(fmt.low_bit for fmt in formats_of(chosen_formats(options))):
        return
    problems = target_of(options.target).problems(layers)
    if problems:
        raise RecipeError("; ".join(problems))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return f"{names[0]}{more}"


def _either(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)


def _blocks(names: Sequence[str], layers: Mapping[str, LayerGrid]) -> str:
    return _either(sorted({layers[name].block_size or 0 for name in names}))


def _inputs(names: Sequence[str], layers: Mapping[str, LayerGrid]) -> str:
    return _either(sorted({layers[name].in_features for name in names}))
