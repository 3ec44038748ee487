"""4-bit codes on disk, int8 GEMM at run time, in standard ONNX.

    codes INT4 [K/bs, bs, N] -> Cast int8 -> QLinearMatMul -> Reshape [K, N]

The product multiplies each block of codes, minus zero points, by the diagonal matrix of its
smoothing factors (int8) and rescales by ``scales / channel scales``. onnxruntime folds all this to
one int8 initializer when it creates the session, and runs what follows
(`exporters.lowering.int8.matmul`) as integer GEMM. Codes, scales and zero points are the
solver's; rounding to int8, one scale per output channel, happens in the fold. The folding keeps
every intermediate until its end: 3 bytes a weight here, 25 with float32 operators.

With the products this fast, attention counts: it becomes one operator
(`epmq_deploy.exporters.lowering.attention`).
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from epmq_deploy.exporters.formats.base import INT8_TOLERANCE, ExportContext, GraphFormat
from epmq_deploy.exporters.graphs.layers import constant, low_bit_nodes, producer, read_packed
from epmq_deploy.exporters.lowering.attention import ATTENTION_OPSET, fuse_attention, has_attention
from epmq_deploy.exporters.lowering.int8.matmul import (
    INT8_SUFFIX,
    Emitter,
    QuantizedInput,
    multiply,
    quantize_input,
    weight_source,
)
from epmq_deploy.exporters.lowering.int8.patches import expand_patches, read_patches
from epmq_deploy.exporters.lowering.int8.plan import (
    Int8Plan,
    channel_scales,
    factor_levels,
    plan_layers,
)
from epmq_deploy.exporters.lowering.int8.smoothing import divide_input
from epmq_deploy.exporters.packing.integer_tensors import SIGNED, integer_tensor, read_layer
from epmq_deploy.exporters.packing.packed_linear import unpack_linear
from epmq_deploy.quantization.results import QuantizedLinear

log = logging.getLogger(__name__)


class Int8ExpandFormat(GraphFormat):
    """Layers within the error budget in int8, the others MatMulNBits.

    Args:
        plans: by layer; every layer in int8 when absent.
        problems: what keeps the layers from being exported as asked.
    """

    name = "int8-expand"
    suffix = "_quantized"
    summary = "4 bits on disk, int8 at run time, standard ONNX: onnxruntime on x86 and ARM"
    tolerance = INT8_TOLERANCE

    def __init__(
        self, plans: Mapping[str, Int8Plan] | None = None, problems: list[str] | None = None
    ):
        self._plans = plans or {}
        self._problems = problems or []

    def planned(
        self, layers: Mapping[str, QuantizedLinear], context: ExportContext
    ) -> "Int8ExpandFormat":
        """See base."""
        problems = []
        if context.options.int8_activations == "static" and not context.inputs:
            problems.append(
                "static activations need calibration statistics, and these layers were quantized "
                "without data; use export.int8_activations: dynamic"
            )
        plans = plan_layers(
            layers,
            context.inputs,
            context.groups,
            context.options.int8_activations,
            context.options.int8_error_budget,
        )
        if layers and not context.inputs:
            log.warning(
                "int8-expand: quantization saw no data, so that no layer's error in int8 is known; "
                "all run in int8, whatever export.int8_error_budget says"
            )
        return Int8ExpandFormat(plans, problems)

    def check(self, layers: Mapping[str, QuantizedLinear]) -> list[str]:
        """See base."""
        return self._problems

    def details(self) -> dict[str, dict[str, Any]]:
        """See base."""
        return {name: plan.details() for name, plan in sorted(self._plans.items())}

    def usual_opset(self, model: ir.Model) -> int:
        """See base."""
        return ATTENTION_OPSET if has_attention(model.graph) else super().usual_opset(model)

    def lower(self, model: ir.Model) -> None:
        """See base."""
        plans = {
            node: self._plans.get(str(node.name), Int8Plan(integer=True))
            for node in low_bit_nodes(model.graph)
        }
        chosen = {node: plan for node, plan in plans.items() if plan.integer}
        divide_input(model.graph, {node: plan.factors for node, plan in chosen.items()})
        quantized: dict[ir.Value, QuantizedInput] = {}
        for node, plan in chosen.items():
            _lower_node(model.graph, node, plan, quantized)
        expand_patches(model.graph)
        if model.graph.opset_imports[""] >= ATTENTION_OPSET:
            fuse_attention(model.graph)
        RemoveUnusedNodesPass()(model)
        RemoveUnusedOpsetsPass()(model)

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """See base."""
        for node in low_bit_nodes(model.graph):
            yield str(node.name), unpack_linear(read_packed(node))
        for node in model.graph:
            source = _expansion(node)
            if source is not None:
                yield str(node.name), _read_expansion(*source)
        yield from read_patches(model.graph)


def _lower_node(
    graph: ir.Graph, node: ir.Node, plan: Int8Plan, quantized: dict[ir.Value, QuantizedInput]
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
    if x not in quantized:
        quantized[x] = quantize_input(emit, x, plan.span)
    product = multiply(emit, quantized[x], weight, scales)
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


def _expansion(node: ir.Node) -> tuple[ir.Node, int | None] | None:
    """The expanding product of a MatMulInteger's weight and, where it is cut, its length."""
    made = weight_source(node)
    columns = None
    if made is not None and made.op_type == "Slice":
        columns = int(constant(made, 2)[0])  # type: ignore[index]
        made = producer(made.inputs[0])
    product = None if made is None else producer(made.inputs[0])
    return (
        (product, columns) if product is not None and product.op_type == "QLinearMatMul" else None
    )


def _read_expansion(product: ir.Node, columns: int | None) -> QuantizedLinear:
    codes = _stored(product.inputs[3])
    ratios = producer(product.inputs[4])
    scales = None if ratios is None else constant(ratios, 0)
    if scales is None:
        raise ValueError(f"node {product.name}: scales are missing")
    blocks, size, rows = codes.shape.numpy()
    zeros = _stored(product.inputs[5]).numpy()
    return read_layer(
        codes,
        scales.reshape(blocks, rows),
        None if zeros.ndim == 0 else zeros,
        blocks * size if columns is None else columns,
        size,
    )


def _stored(value: ir.Value | None) -> ir.TensorProtocol:
    """A tensor of the file, as it is or before it is cast."""
    cast = producer(value)
    held = value if cast is None else cast.inputs[0]
    if held is None or held.const_value is None:
        raise ValueError("codes are no tensor of the file")
    return held.const_value


FORMAT = Int8ExpandFormat()
