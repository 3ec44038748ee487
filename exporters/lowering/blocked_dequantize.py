"""MatMulNBits as blocked ``DequantizeLinear`` in front of ``MatMul``: standard ONNX.

The shape that onnxruntime fuses back to MatMulNBits at its extended level (measured on 1.31, CPU:
4 and 8 bits, blocks of 16 to 256, ragged last blocks, odd sizes): weight ``[K, N]``, ``axis=0``,
plain MatMul, initializers of its own for every layer.
"""

import numpy as np
import onnx_ir as ir

from epmq_deploy.exporters.lowering.layers import add_initializer, low_bit_nodes, read_packed
from epmq_deploy.exporters.packing.integer_tensors import SIGNED, UNSIGNED, integer_tensor
from epmq_deploy.exporters.packing.packed_linear import unpack_linear

_ZERO = "epmq_deploy.zero"


class DequantizeInBlocks(ir.passes.InPlacePass):
    """Replace every MatMulNBits node.

    Codes are signed without zero points where symmetric, else unsigned with zero points. After: no
    MatMulNBits node is left; each MatMul carries its layer's name.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them."""
        nodes = list(low_bit_nodes(model.graph))
        for node in nodes:
            _lower_node(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


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
    """Return the same as a maximum: onnxruntime does not fuse a MatMul right before a Relu."""
    if _ZERO not in graph.initializers:
        add_initializer(graph, ir.Tensor(np.zeros((), np.float32), name=_ZERO))
    maximum = ir.node("Max", [relu.inputs[0], graph.initializers[_ZERO]], name=relu.name)
    ir.convenience.replace_nodes_and_values(
        graph, relu, [relu], [maximum], relu.outputs, maximum.outputs
    )
