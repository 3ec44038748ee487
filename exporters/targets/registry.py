"""Where a model is to run: which formats suit it, what its kernels take, and why.

A target's constraints hold for the linear layers of its low-bit formats. What could not be verified
for want of the device is said in ``unverified`` rather than turned into a constraint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.formats import GraphFormat, formats_of
from epmq_deploy.exporters.packing.packed_linear import container_bits
from epmq_deploy.exporters.targets.layer_grid import LayerGrid
from epmq_deploy.recipe import ExportOptions

DEFAULT_FORMATS = ("matmulnbits", "qdq")
_INT8_FORMAT = "int8-expand"


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
            f"target {options.target}: its kernels take no 2-bit containers; set "
            "export.two_bit_containers: false",
            options={"export.two_bit_containers": False},
        )
    return False


def check_export(options: ExportOptions) -> None:
    """Make sure that target, formats and options go together, before there are layers to look at.

    Raises:
        RecipeError: target or format does not exist, the target has no kernel for what was asked
            for, or options have no effect on the formats; names every one.
    """
    formats = formats_of(chosen_formats(options))
    problems = _without_effect(options, formats)
    helpful = {}
    try:
        chosen_two_bit_containers(options)
    except RecipeError as error:
        problems.insert(0, str(error))
        helpful = error.options
    if problems:
        raise RecipeError("; ".join(problems), options=helpful)


def _without_effect(options: ExportOptions, formats: Sequence[GraphFormat]) -> list[str]:
    """One clause for every option that differs from its default and that no format looks at."""
    names = [fmt.name for fmt in formats]
    found = []
    if options.two_bit_containers and not any(fmt.stores_two_bits for fmt in formats):
        found.append(
            f"export.two_bit_containers: no chosen format ({', '.join(names)}) can store 2 bits; "
            "add matmulnbits or leave it out"
        )
    if _INT8_FORMAT not in names:
        given = options.model_dump(exclude_defaults=True)
        found += [
            f"export.{name} is for {_INT8_FORMAT}, which is not among the formats "
            f"({', '.join(names)}); add it or leave the option out"
            for name in ("int8_activations", "int8_error_budget")
            if name in given
        ]
    return found
