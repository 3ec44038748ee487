"""Low-bit codes that expand to int8 when a session is created.

    codes INT4 [K/bs, bs, N] -> Cast int8 -> QLinearMatMul -> Reshape [K, N]

The product multiplies each block of codes, minus zero points, by the diagonal matrix of its
smoothing factors (int8) and rescales by ``scales / channel scales``. onnxruntime folds all this to
one int8 initializer when it creates the session, and runs what follows
(`exporters.lowering.int8.matmul`) as integer GEMM. Codes, scales and zero points are the
solver's; rounding to int8, one scale per output channel, happens in the fold. The folding keeps
every intermediate until its end: 3 bytes a weight here, 25 with float32 operators.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from epmq_deploy.exporters.lowering.int8.matmul import (
    INT8_SUFFIX,
    Emitter,
    QuantizedInput,
    multiply,
    quantize_input,
)
from epmq_deploy.exporters.lowering.int8.plan import Int8Plan, channel_scales, factor_levels
from epmq_deploy.exporters.lowering.int8.smoothing import divide_input
from epmq_deploy.exporters.lowering.layers import layer_of, low_bit_nodes, read_packed
from epmq_deploy.exporters.packing.integer_tensors import SIGNED, integer_tensor
from epmq_deploy.exporters.packing.packed_linear import unpack_linear
from epmq_deploy.quantization.results import QuantizedLinear

# What layers may share once it is quantized: a value and the range it is quantized in.
_Activations = tuple[ir.Value, tuple[float, float] | None]


class ExpandToInt8(ir.passes.InPlacePass):
    """Replace MatMulNBits nodes by integer GEMM, their inputs smoothed.

    After: layers that the plan leaves alone are MatMulNBits still; every other multiplying node
    carries its layer's name.

    Args:
        plans: by layer; a layer without a plan is replaced, not smoothed.
    """

    def __init__(self, plans: Mapping[str, Int8Plan]) -> None:
        super().__init__()
        self._plans = plans

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them."""
        plans = {
            node: self._plans.get(layer_of(node.name), Int8Plan(integer=True))
            for node in low_bit_nodes(model.graph)
        }
        integer = {node: plan for node, plan in plans.items() if plan.integer}
        divide_input(model.graph, {node: plan.factors for node, plan in integer.items()})
        quantized: dict[_Activations, QuantizedInput] = {}
        for node, plan in integer.items():
            _lower_node(model.graph, node, plan, quantized)
        return ir.passes.PassResult(model, modified=bool(integer))


def _lower_node(
    graph: ir.Graph, node: ir.Node, plan: Int8Plan, quantized: dict[_Activations, QuantizedInput]
) -> None:
    layer = unpack_linear(read_packed(node))
    emit = Emitter(graph, str(node.name))
    # The node's own initializers keep these names until they are dropped here.
    for value in node.inputs[1:]:
        if value is not None:
            graph.initializers.pop(str(value.name))
    factors = plan.factors
    scales = emit.tensor("channel_scales", channel_scales(layer.dequantize(), factors).numpy())
    weight = _expand(emit, layer, scales, factors)
    x = node.inputs[0]
    assert x is not None, "MatMulNBits has an input"
    activations = x, plan.span
    if activations not in quantized:
        quantized[activations] = quantize_input(emit, *activations)
    product = multiply(emit, quantized[activations], weight, scales)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], emit.nodes, node.outputs, [product]
    )


def _expand(
    emit: Emitter, layer: QuantizedLinear, channels: ir.Value, factors: torch.Tensor | None
) -> ir.Value:
    """Nodes from codes to int8 ``[K, N]``; what pads the last block is cut off again."""
    rows, columns = layer.codes.shape
    size, blocks = layer.group_size, layer.scales.shape[1]
    dtype = SIGNED[layer.bits]
    padding = blocks * size - columns
    padded = np.pad(layer.codes.numpy(), ((0, 0), (0, padding)))
    stored = integer_tensor(f"{emit.name}.codes", padded.T.reshape(blocks, size, rows), dtype)
    codes = _as_int8(emit, stored, "codes_int8")
    zero = emit.shared("zero_int8", np.array(0, np.int8))
    zero_points = zero
    if not layer.symmetric:
        zeros = layer.zero_points.numpy().T.reshape(blocks, 1, rows)
        tensor = integer_tensor(f"{emit.name}.zero_points", zeros, dtype)
        zero_points = _as_int8(emit, tensor, "zero_points_int8")
    scales = emit.tensor("scales", layer.scales.numpy().T.reshape(blocks, 1, rows))
    steps = emit.value("Div", [scales, channels], "scale_ratios")
    levels, unit = np.ones(columns, np.int8), 1.0
    if factors is not None:
        tensor_levels, unit = factor_levels(factors)
        levels = tensor_levels.numpy()
    smoothing = np.pad(levels, (0, padding), constant_values=1).reshape(blocks, 1, size)
    # All bits set on the diagonal: ands with the factors of each column.
    mask = emit.shared(f"diagonal_{size}", -np.eye(size, dtype=np.int8))
    diagonal = emit.value("BitwiseAnd", [mask, emit.tensor("smoothing", smoothing)], "diagonal")
    unit_value = emit.tensor("smoothing_unit", np.array(unit, np.float32))
    one = emit.shared("one", np.array(1, np.float32))
    operands = [diagonal, unit_value, zero, codes, steps, zero_points, one, zero]
    blocked = emit.value("QLinearMatMul", operands, "blocked")
    shape = emit.tensor("int8_shape", np.array([blocks * size, rows]))
    suffix = INT8_SUFFIX.removeprefix(".")
    if not padding:
        return emit.value("Reshape", [blocked, shape], suffix)
    flat = emit.value("Reshape", [blocked, shape], "padded")
    start, end = emit.tensor("start", np.array([0])), emit.tensor("columns", np.array([columns]))
    return emit.value("Slice", [flat, start, end], suffix)


def _as_int8(emit: Emitter, stored: ir.TensorProtocol, suffix: str) -> ir.Value:
    value = emit.add(stored)
    if stored.dtype == ir.DataType.INT8:
        return value
    return emit.value("Cast", [value], suffix, {"to": ir.DataType.INT8})
