"""Blocked ``DequantizeLinear`` in front of ``MatMul``: standard ONNX, no custom operator.

The shape that onnxruntime fuses back to MatMulNBits at its extended level (measured on 1.31, CPU:
4 and 8 bits, blocks of 16 to 256, ragged last blocks, odd sizes): weight ``[K, N]``, ``axis=0``,
plain MatMul, initializers of its own for every layer.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from epmq_deploy.exporters.formats.base import GraphFormat
from epmq_deploy.exporters.graphs.layers import (
    add_initializer,
    constant,
    low_bit_nodes,
    read_packed,
)
from epmq_deploy.exporters.packing.integer_tensors import (
    SIGNED,
    UNSIGNED,
    integer_tensor,
    read_layer,
)
from epmq_deploy.exporters.packing.packed_linear import unpack_linear
from epmq_deploy.quantization.results import QuantizedLinear

_ZERO = "epmq_deploy.zero"


class QdqFormat(GraphFormat):
    """Signed codes without zero points where symmetric, else unsigned codes with zero points."""

    name = "qdq"
    suffix = "_qdq"
    summary = "DequantizeLinear + MatMul in standard ONNX: onnxruntime, TensorRT, OpenVINO"

    def check(self, layers: Mapping[str, QuantizedLinear]) -> list[str]:
        """Nothing: whatever can be packed was measured to fuse."""
        return []

    def lower(self, model: ir.Model) -> None:
        """See base."""
        for node in list(low_bit_nodes(model.graph)):
            _lower_node(model.graph, node)
        RemoveUnusedOpsetsPass()(model)

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """See base."""
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            dequantize = weight.producer() if weight is not None else None
            if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                yield str(node.name), _read_node(dequantize)


def _lower_node(graph: ir.Graph, node: ir.Node) -> None:
    layer = unpack_linear(read_packed(node))
    name = str(node.name)
    # The node's own initializers keep these names until they are dropped below.
    for value in node.inputs[1:]:
        if value is not None:
            graph.initializers.pop(str(value.name))
    dtype = (SIGNED if layer.symmetric else UNSIGNED)[layer.bits]
    scales = np.ascontiguousarray(layer.scales.numpy().T)
    inputs = [
        add_initializer(graph, integer_tensor(f"{name}.codes", layer.codes.numpy().T, dtype)),
        add_initializer(graph, ir.Tensor(scales, name=f"{name}.scales")),
    ]
    if not layer.symmetric:
        zero_points = integer_tensor(f"{name}.zero_points", layer.zero_points.numpy().T, dtype)
        inputs.append(add_initializer(graph, zero_points))
    dequantize = ir.node(
        "DequantizeLinear",
        inputs,
        {"axis": 0, "block_size": layer.group_size},
        name=f"{name}.dequantize",
        outputs=[ir.Value(name=f"{name}.weight")],
    )
    multiply = ir.node("MatMul", [node.inputs[0], dequantize.outputs[0]], name=name)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [dequantize, multiply], node.outputs, multiply.outputs
    )
    for use in list(multiply.outputs[0].uses()):
        if use.node.op_type == "Relu":
            _without_relu(graph, use.node)


def _without_relu(graph: ir.Graph, relu: ir.Node) -> None:
    """The same as a maximum: onnxruntime does not fuse a MatMul right before a Relu."""
    if _ZERO not in graph.initializers:
        add_initializer(graph, ir.Tensor(np.zeros((), np.float32), name=_ZERO))
    maximum = ir.node("Max", [relu.inputs[0], graph.initializers[_ZERO]], name=relu.name)
    ir.convenience.replace_nodes_and_values(
        graph, relu, [relu], [maximum], relu.outputs, maximum.outputs
    )


def _read_node(dequantize: ir.Node) -> QuantizedLinear:
    scales = constant(dequantize, 1)
    codes = dequantize.inputs[0].const_value  # type: ignore[union-attr]
    if codes is None or scales is None:
        raise ValueError(f"node {dequantize.name}: codes or scales are missing")
    block = dequantize.attributes.get_int("block_size")
    return read_layer(codes, scales, constant(dequantize, 2), codes.shape.numpy()[0], block)


FORMAT = QdqFormat()
