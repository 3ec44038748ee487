"""Patch embeddings, convolutions whose windows do not overlap, as integer GEMM.

onnxruntime would dequantize such a kernel on every run and convolve in float32. Its INT8 codes with
one scale per output channel are an int8 weight as they are.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from epmq_deploy.exporters.int8_matmul import INT8_SUFFIX, Emitter, multiply, quantize_input
from epmq_deploy.exporters.int8_rows import row_layer
from epmq_deploy.quantization.quantized_linear import QuantizedLinear


def expand_patches(graph: ir.Graph) -> None:
    """Replace every such convolution of a kernel stored as rows (`int8_rows`), in place."""
    for node in list(graph):
        kernel = _kernel(node)
        if kernel is not None and _is_patchwise(node, kernel.shape):
            _lower(graph, node, kernel)


def read_patches(graph: ir.Graph) -> dict[str, QuantizedLinear]:
    """Such layers by dotted name, 8 bits with one group per row."""
    layers = {}
    for node in graph:
        if node.op_type != "MatMulInteger":
            continue
        transpose = node.inputs[1].producer()  # type: ignore[union-attr]
        if transpose is None or transpose.op_type != "Transpose":
            continue
        codes = transpose.inputs[0].producer().inputs[0].const_value  # type: ignore[union-attr]
        scales = graph.initializers[f"{node.name}.scales"].const_value
        assert codes is not None and scales is not None, "written by `expand_patches`"
        layers[str(node.name)] = row_layer(codes, scales, None)
    return layers


def _kernel(conv: ir.Node) -> ir.TensorProtocol | None:
    """The INT8 codes ``[N, C, kh, kw]`` of a convolution's weight."""
    weight = conv.inputs[1] if conv.op_type == "Conv" else None
    dequantize = weight.producer() if weight is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    codes = dequantize.inputs[0].const_value  # type: ignore[union-attr]
    return codes if codes is not None and codes.dtype == ir.DataType.INT8 else None


def _is_patchwise(conv: ir.Node, kernel: ir.ShapeProtocol) -> bool:
    """Whether windows lie side by side and cover an image of fixed size."""
    attributes, window = conv.attributes, tuple(kernel[2:])
    image = None if conv.inputs[0] is None else conv.inputs[0].shape
    plain = (
        not any(attributes.get_ints("pads", (0,)))
        and set(attributes.get_ints("dilations", (1,))) == {1}
        and attributes.get_int("group", 1) == 1
        and attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )
    if not plain or image is None or len(window) != 2:
        return False
    sizes = tuple(image[2:])
    return tuple(attributes.get_ints("strides", (1, 1))) == window and all(
        isinstance(size, int) and size % step == 0 for size, step in zip(sizes, window, strict=True)
    )


def _lower(graph: ir.Graph, conv: ir.Node, kernel: ir.TensorProtocol) -> None:
    emit = Emitter(graph, str(conv.name))
    image, weight = conv.inputs[0], conv.inputs[1]
    assert image is not None and weight is not None, "checked before"
    dequantize = weight.producer()
    assert dequantize is not None, "checked before"
    codes, scales = dequantize.inputs[:2]
    channels, planes, height, width = kernel.shape.numpy()
    sizes = zip(image.shape[2:], (height, width), strict=True)
    down, across = (int(size) // step for size, step in sizes)

    def shape(suffix: str, *sizes: int) -> ir.Value:
        return emit.tensor(suffix, np.array(sizes, np.int64))

    # Quantized first: moving bytes is cheaper than moving floats.
    pixels = quantize_input(emit, image, None)
    split = shape("windows_shape", 0, planes, down, height, across, width)
    windows = emit.value("Reshape", [pixels.values, split], "windows")
    ordered = emit.value("Transpose", [windows], "patches", {"perm": [0, 2, 4, 1, 3, 5]})
    flat = shape("rows_shape", 0, down * across, planes * height * width)
    rows = emit.value("Reshape", [ordered, flat], "rows")
    matrix = emit.value("Reshape", [codes, shape("matrix_shape", channels, -1)], "matrix")
    int8 = emit.value("Transpose", [matrix], INT8_SUFFIX.removeprefix("."), {"perm": [1, 0]})
    output = multiply(emit, replace(pixels, values=rows), int8, scales)
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        output = emit.value("Add", [output, conv.inputs[2]], "biased")
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
    reshape = _only_reader(conv.outputs[0], "Reshape")
    flat = None if reshape is None else reshape.outputs[0]
    if flat is None or flat.shape is None or len(flat.shape) != 3 or flat.shape[1] != channels:
        return None
    transpose = _only_reader(flat, "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != (0, 2, 1):
        return None
    return None if transpose.outputs[0].is_graph_output() else transpose.outputs[0]


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    alone = len(readers) == 1 and not value.is_graph_output()
    return readers[0] if alone and readers[0].op_type == op_type else None
