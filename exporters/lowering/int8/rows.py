"""Convolutions and embedding tables as INT8 tensors with one scale per row, in standard ONNX.

A row is what one scale belongs to: an output channel of a convolution, an entry of a table.

    codes INT8 [N, ...] -> DequantizeLinear(axis 0, scales [N]) -> Conv
    ids -> Gather(codes INT8 [V, D]) -> Cast -> Mul(Gather(scales [V, 1]))

Only the rows that are looked up are dequantized. In front of the Gather, ``DequantizeLinear`` would
compute the whole table on every run; behind it, blocked (opset 21), it is slower than Cast and Mul
(measured on onnxruntime 1.31, CPU). ``com.microsoft::GatherBlockQuantized`` gives the same numbers,
but needs its scales repeated per block (2.8% more bytes) and saves 0.1 ms for 1024 tokens, nothing
for 32 (``benchmarks/low_bit_kernels.py``): not worth leaving standard ONNX for.

Naming is that of `epmq_deploy.exporters.lowering.layers`: initializers ``<layer>.codes`` and
``<layer>.scales``, and the layer's name on the Conv or Mul.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch

from epmq_deploy.exporters.lowering.layers import (
    LAYER_KEY,
    add_initializer,
    constant,
    producer,
    refuse_repeated,
)
from epmq_deploy.quantization.results import QuantizedLinear

# Placeholders that torch's exporter cannot fold: with constant ids it would turn a standard Gather
# of a small table into a float initializer.
ROWS_DOMAIN = "epmq_deploy"
DEQUANTIZE = "DequantizeRows"
LOOK_UP = "LookUpRows"

_BITS = 8
_OFFSET = 2 ** (_BITS - 1)
_DEQUANTIZE_SUFFIX = ".dequantize"


def signed_codes(layer: QuantizedLinear) -> torch.Tensor:
    """Codes minus 128, int8 ``[N, K]``."""
    shifted: torch.Tensor = layer.codes.cpu().to(torch.int16) - _OFFSET
    return shifted.to(torch.int8)


class LowerRows(ir.passes.InPlacePass):
    """Replace the placeholders by standard operators, named after their layers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them.

        Raises:
            MismatchError: a layer runs more than once.
        """
        graph = model.graph
        nodes = [node for node in graph if node.domain == ROWS_DOMAIN]
        refuse_repeated(nodes)
        for node in nodes:
            name = node.metadata_props[LAYER_KEY]
            lower = _lower_dequantize if node.op_type == DEQUANTIZE else _lower_look_up
            new = lower(graph, node, name)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], new, node.outputs, new[-1].outputs
            )
            if node.op_type == DEQUANTIZE:
                _name_convolution(new[-1], name)
        return ir.passes.PassResult(model, modified=bool(nodes))


def read_rows(graph: ir.Graph) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield stored convolutions and tables with dotted names, 8 bits with one group per row.

    Only what this module writes is found: INT8 codes and float32 scales that are initializers.
    """
    for node in graph:
        if node.op_type == "DequantizeLinear" and (held := _operands(node)) is not None:
            name = str(node.name).removesuffix(_DEQUANTIZE_SUFFIX)
            yield name, row_layer(*held, constant(node, 2))
        elif node.op_type == "Mul" and (held := _tables(node)) is not None:
            yield str(node.name), row_layer(*held, None)


def row_layer(
    codes: ir.TensorProtocol, scales: ir.TensorProtocol, zero_points: np.ndarray | None
) -> QuantizedLinear:
    """Return the layer that INT8 codes ``[N, ...]`` with one scale per row stand for."""
    stored = codes.numpy()
    rows = stored.reshape(stored.shape[0], -1).astype(np.int16) + _OFFSET
    # Never written; read so that a file with any is found to differ.
    shift = np.zeros(len(rows), np.int16) if zero_points is None else zero_points.astype(np.int16)
    zeros = torch.from_numpy((shift.reshape(-1, 1) + _OFFSET).astype(np.uint8))
    return QuantizedLinear(
        codes=torch.from_numpy(rows.astype(np.uint8)),
        scales=torch.from_numpy(scales.numpy().reshape(-1, 1).copy()),
        zero_points=zeros,
        bits=_BITS,
        group_size=rows.shape[1],
        symmetric=bool((zeros == _OFFSET).all()),
    )


def _lower_dequantize(graph: ir.Graph, node: ir.Node, name: str) -> list[ir.Node]:
    node.outputs[0].name = f"{name}.weight"
    inputs = _initializers(graph, node, name, scale_shape=(-1,))
    dequantize_name = f"{name}{_DEQUANTIZE_SUFFIX}"
    return [ir.node("DequantizeLinear", inputs, {"axis": 0}, name=dequantize_name)]


def _lower_look_up(graph: ir.Graph, node: ir.Node, name: str) -> list[ir.Node]:
    codes, scales = (
        ir.node(
            "Gather",
            [table, node.inputs[2]],
            {"axis": 0},
            name=f"{table.name}.gather",
            outputs=[ir.Value(name=f"{table.name}.gathered")],
        )
        for table in _initializers(graph, node, name, scale_shape=(-1, 1))
    )
    cast = ir.node(
        "Cast",
        codes.outputs,
        {"to": ir.DataType.FLOAT},
        name=f"{name}.cast",
        outputs=[ir.Value(name=f"{name}.steps")],
    )
    if not node.outputs[0].is_graph_output():
        node.outputs[0].name = f"{name}.rows"
    multiply = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=name)
    return [codes, scales, cast, multiply]


def _initializers(
    graph: ir.Graph, node: ir.Node, name: str, *, scale_shape: tuple[int, ...]
) -> tuple[ir.Value, ir.Value]:
    """Codes and scales of the layer's own: the optimizer may have merged those of several."""
    codes, scales = constant(node, 0), constant(node, 1)
    assert codes is not None and scales is not None, "the stand-ins pass both"
    return (
        add_initializer(graph, ir.Tensor(codes, name=f"{name}.codes")),
        add_initializer(graph, ir.Tensor(scales.reshape(scale_shape), name=f"{name}.scales")),
    )


def _name_convolution(dequantize: ir.Node, name: str) -> None:
    users = [use.node for use in dequantize.outputs[0].uses()]
    if [user.op_type for user in users] == ["Conv"]:
        users[0].name = name


def _operands(dequantize: ir.Node) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
    """Codes and scales of a DequantizeLinear with one scale per row; None for any other."""
    attributes = dequantize.attributes
    if attributes.get_int("axis", 1) != 0 or attributes.get_int("block_size", 0) != 0:
        return None
    return _tensors(dequantize.inputs[0], dequantize.inputs[1])


def _tables(multiply: ir.Node) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
    """Codes and scales whose looked-up rows a Mul multiplies; None for any other Mul."""
    cast = producer(multiply.inputs[0], "Cast")
    codes = None if cast is None else producer(cast.inputs[0], "Gather")
    scales = producer(multiply.inputs[1], "Gather")
    if codes is None or scales is None or codes.inputs[1] is not scales.inputs[1]:
        return None
    if any(gather.attributes.get_int("axis", 0) != 0 for gather in (codes, scales)):
        return None
    return _tensors(codes.inputs[0], scales.inputs[0])


def _tensors(
    codes: ir.Value | None, scales: ir.Value | None
) -> tuple[ir.TensorProtocol, ir.TensorProtocol] | None:
    """Return the initializers, where they are INT8 and float32."""
    integers = None if codes is None else codes.const_value
    floats = None if scales is None else scales.const_value
    if integers is None or integers.dtype != ir.DataType.INT8:
        return None
    if floats is None or floats.dtype != ir.DataType.FLOAT:
        return None
    return integers, floats
