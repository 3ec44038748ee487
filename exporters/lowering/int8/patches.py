"""Patch embeddings, convolutions whose windows do not overlap, as integer GEMM.

onnxruntime would dequantize such a kernel on every run and convolve in float32. Its INT8 codes with
one scale per output channel are an int8 weight as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from epmq_deploy.exporters.lowering.int8.matmul import (
    INT8_SUFFIX,
    Emitter,
    multiply,
    quantize_input,
    weight_source,
)
from epmq_deploy.exporters.lowering.int8.rows import row_layer
from epmq_deploy.exporters.lowering.layers import only_reader
from epmq_deploy.quantization.results import QuantizedLinear


@dataclass(frozen=True)
class _Patches:
    """A convolution that can be replaced.

    Attributes:
        image: its input, ``[B, C, H, W]``.
        codes: INT8 ``[N, C, kh, kw]``.
        scales: float32 ``[N]``.
        bias: ``[N]``, where there is one.
        kernel: ``N``, ``C``, ``kh``, ``kw``.
        grid: patches down and across.
    """

    image: ir.Value
    codes: ir.Value
    scales: ir.Value
    bias: ir.Value | None
    kernel: tuple[int, ...]
    grid: tuple[int, int]


class ExpandPatches(ir.passes.InPlacePass):
    """Replace every such convolution whose kernel is stored as INT8 rows (`lowering.int8.rows`)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them."""
        modified = False
        for node in list(model.graph):
            patches = _patches(node) if node.op_type == "Conv" else None
            if patches is not None:
                _lower(model.graph, node, patches)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def read_patches(graph: ir.Graph) -> Iterator[tuple[str, QuantizedLinear]]:
    """Such layers with their dotted names, 8 bits with one group per row."""
    for node in graph:
        transpose = weight_source(node)
        if transpose is None or transpose.op_type != "Transpose":
            continue
        codes = transpose.inputs[0].producer().inputs[0].const_value  # type: ignore[union-attr]
        scales = graph.initializers[f"{node.name}.scales"].const_value
        assert codes is not None and scales is not None, "written by `ExpandPatches`"
        yield str(node.name), row_layer(codes, scales, None)


def _patches(conv: ir.Node) -> _Patches | None:
    """Return what to replace; None where windows overlap or do not cover an image of fixed size."""
    image, weight, bias = (*conv.inputs, None)[:3]
    dequantize = None if weight is None else weight.producer()
    if image is None or image.shape is None or dequantize is None or not _is_plain(conv):
        return None
    codes, scales = dequantize.inputs[:2]
    if codes is None or scales is None or codes.const_value is None:
        return None
    kernel = codes.const_value.shape.numpy()
    sizes = [size for size in image.shape[2:] if isinstance(size, int)]
    if codes.const_value.dtype != ir.DataType.INT8 or len(sizes) != 2 or len(kernel) != 4:
        return None
    window = kernel[2:]
    if tuple(conv.attributes.get_ints("strides", (1, 1))) != window:
        return None
    if any(size % step for size, step in zip(sizes, window, strict=True)):
        return None
    grid = (sizes[0] // window[0], sizes[1] // window[1])
    return _Patches(image, codes, scales, bias, tuple(kernel), grid)


def _is_plain(conv: ir.Node) -> bool:
    """Neither padding, nor dilation, nor groups."""
    attributes = conv.attributes
    return (
        not any(attributes.get_ints("pads", (0,)))
        and set(attributes.get_ints("dilations", (1,))) == {1}
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def _lower(graph: ir.Graph, conv: ir.Node, layer: _Patches) -> None:
    emit = Emitter(graph, str(conv.name))
    channels, planes, height, width = layer.kernel
    down, across = layer.grid

    def shape(suffix: str, *sizes: int) -> ir.Value:
        return emit.tensor(suffix, np.array(sizes, np.int64))

    # Quantized first: moving bytes is cheaper than moving floats.
    pixels = quantize_input(emit, layer.image, None)
    split = shape("windows_shape", 0, planes, down, height, across, width)
    windows = emit.value("Reshape", [pixels.values, split], "windows")
    ordered = emit.value("Transpose", [windows], "patches", {"perm": [0, 2, 4, 1, 3, 5]})
    flat = shape("rows_shape", 0, down * across, planes * height * width)
    rows = emit.value("Reshape", [ordered, flat], "rows")
    matrix = emit.value("Reshape", [layer.codes, shape("matrix_shape", channels, -1)], "matrix")
    int8 = emit.value("Transpose", [matrix], INT8_SUFFIX.removeprefix("."), {"perm": [1, 0]})
    output = multiply(emit, replace(pixels, values=rows), int8, layer.scales)
    if layer.bias is not None:
        output = emit.value("Add", [output, layer.bias], "biased")
    tokens = _tokens(conv, channels)
    if tokens is not None:
        graph.insert_before(conv, emit.nodes)
        ir.convenience.replace_all_uses_with(tokens, output)
        return
    moved = emit.value("Transpose", [output], "channels_first", {"perm": [0, 2, 1]})
    grid = shape("grid_shape", 0, channels, down, across)
    emit.value("Reshape", [moved, grid], "grid")
    ir.convenience.replace_nodes_and_values(
        graph, conv, [conv], emit.nodes, conv.outputs, emit.nodes[-1].outputs
    )


def _tokens(conv: ir.Node, channels: int) -> ir.Value | None:
    """``[B, patches, N]``, where that is all that is made of the convolution's output."""
    reshape = only_reader(conv.outputs[0], "Reshape")
    flat = None if reshape is None else reshape.outputs[0]
    if flat is None or flat.shape is None or len(flat.shape) != 3 or flat.shape[1] != channels:
        return None
    transpose = only_reader(flat, "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != (0, 2, 1):
        return None
    return None if transpose.outputs[0].is_graph_output() else transpose.outputs[0]
