"""Blocked ``DequantizeLinear`` in front of ``MatMul``: standard ONNX, no custom operator.

The shape that onnxruntime fuses back to MatMulNBits at its extended level (measured on 1.31, CPU:
4 and 8 bits, blocks of 16 to 256, ragged last blocks, odd sizes): weight ``[K, N]``, ``axis=0``,
plain MatMul, initializers of its own for every layer.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from epmq_deploy.exporters.formats.format import GraphFormat
from epmq_deploy.exporters.graph import add_initializer, constant, low_bit_nodes, read_packed
from epmq_deploy.exporters.packed_linear import unpack_linear
from epmq_deploy.exporters.packing import Bytes, pack_flat
from epmq_deploy.quantization.quantized_linear import QuantizedLinear

_SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
_ZERO = "epmq_deploy.zero"
_UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


class QdqFormat(GraphFormat):
    """Signed codes without zero points where symmetric, else unsigned codes with zero points."""

    name = "qdq"
    suffix = "_qdq"
    summary = "DequantizeLinear + MatMul in standard ONNX: onnxruntime, TensorRT, OpenVINO"
    min_opset = 21

    def check(self, layers: Mapping[str, QuantizedLinear]) -> list[str]:
        """Nothing: whatever can be packed was measured to fuse."""
        return []

    def lower(self, model: ir.Model) -> None:
        """See base."""
        for node in list(low_bit_nodes(model.graph)):
            _lower_node(model.graph, node)
        RemoveUnusedOpsetsPass()(model)

    def read(self, model: ir.Model) -> dict[str, QuantizedLinear]:
        """See base."""
        layers = {}
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            dequantize = weight.producer() if weight is not None else None
            if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                layers[str(node.name)] = _read_node(dequantize)
        return layers


def _lower_node(graph: ir.Graph, node: ir.Node) -> None:
    layer = unpack_linear(read_packed(node))
    name = str(node.name)
    # The node's own initializers keep these names until they are dropped below.
    for value in node.inputs[1:]:
        if value is not None:
            graph.initializers.pop(str(value.name))
    dtype = (_SIGNED if layer.symmetric else _UNSIGNED)[layer.bits]
    scales = np.ascontiguousarray(layer.scales.numpy().T)
    inputs = [
        add_initializer(graph, _integers(f"{name}.codes", layer.codes.numpy(), dtype)),
        add_initializer(graph, ir.Tensor(scales, name=f"{name}.scales")),
    ]
    if not layer.symmetric:
        zero_points = _integers(f"{name}.zero_points", layer.zero_points.numpy(), dtype)
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


def _integers(name: str, values: Bytes, dtype: ir.DataType) -> ir.TensorProtocol:
    """Codes ``[N, K]`` or zero points ``[N, k_blocks]``, below 2**bits, as a transposed tensor.

    Flipping the top bit subtracts ``2**(bits - 1)`` in two's complement.
    """
    bits = dtype.bitwidth
    flipped = values ^ np.uint8(2 ** (bits - 1)) if dtype.is_signed() else values
    transposed = np.ascontiguousarray(flipped.T)
    if bits == 8:
        return ir.Tensor(transposed.view(dtype.numpy()), name=name)
    return ir.PackedTensor(pack_flat(transposed, bits), dtype, shape=transposed.shape, name=name)


def _read_node(dequantize: ir.Node) -> QuantizedLinear:
    codes, scales, zero_points = (constant(dequantize, index) for index in range(3))
    if codes is None or scales is None:
        raise ValueError(f"node {dequantize.name}: codes or scales are missing")
    dtype = dequantize.inputs[0].const_value.dtype  # type: ignore[union-attr]
    bits = dtype.bitwidth
    offset = 2 ** (bits - 1) if dtype.is_signed() else 0
    shifted = [
        # Left out, DequantizeLinear's zero point is 0 whatever the type.
        np.zeros(scales.shape, np.int16) if array is None else array.astype(np.int16)
        for array in (codes, zero_points)
    ]
    stored = [
        torch.from_numpy(np.ascontiguousarray((array + offset).T.astype(np.uint8)))
        for array in shifted
    ]
    return QuantizedLinear(
        codes=stored[0],
        scales=torch.from_numpy(scales.T.copy()),
        zero_points=stored[1],
        bits=bits,
        group_size=dequantize.attributes.get_int("block_size"),
        symmetric=bool((stored[1] == 2 ** (bits - 1)).all()),
    )


FORMAT = QdqFormat()
