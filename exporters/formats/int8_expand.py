"""4-bit codes on disk, int8 GEMM at run time, in standard ONNX.

Codes expand to int8 when a session is created (`exporters.lowering.int8.expand`). With products
this fast, attention counts: it becomes one operator (`exporters.lowering.attention`).
"""

import logging
from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from epmq_deploy.exporters.formats.base import (
    INT8_TOLERANCE,
    ExportContext,
    FormatPlan,
    GraphFormat,
)
from epmq_deploy.exporters.lowering.attention import ATTENTION_OPSET, FuseAttention, has_attention
from epmq_deploy.exporters.lowering.int8.expand import ExpandToInt8
from epmq_deploy.exporters.lowering.int8.matmul import weight_source
from epmq_deploy.exporters.lowering.int8.patches import ExpandPatches, read_patches
from epmq_deploy.exporters.lowering.int8.plan import Int8Plan, plan_layers
from epmq_deploy.exporters.lowering.layers import constant, low_bit_nodes, producer, read_packed
from epmq_deploy.exporters.packing.integer_tensors import read_layer
from epmq_deploy.exporters.packing.packed_linear import unpack_linear
from epmq_deploy.quantization.results import QuantizedLinear

log = logging.getLogger(__name__)


class Int8ExpandFormat(GraphFormat):
    """Layers within the error budget in int8, the others MatMulNBits."""

    name = "int8-expand"
    suffix = "_quantized"
    summary = "4 bits on disk, int8 at run time, standard ONNX: onnxruntime on x86 and ARM"
    tolerance = INT8_TOLERANCE
    option_names = ("int8_activations", "int8_error_budget")

    def plan(self, layers: Mapping[str, QuantizedLinear], context: ExportContext) -> FormatPlan:
        """Decide for each layer whether it runs in int8, and how its inputs are smoothed."""
        options = context.options
        problems = []
        if options.int8_activations == "static" and not context.inputs:
            problems.append(
                "static activations need calibration statistics, but these layers were quantized "
                "without data; use export.int8_activations: dynamic"
            )
        plans = plan_layers(
            layers,
            context.inputs,
            context.groups,
            options.int8_activations,
            options.int8_error_budget,
        )
        if layers and not context.inputs:
            log.warning(
                "int8-expand: the model was quantized without calibration data, so errors of "
                "layers in int8 cannot be estimated; all layers run in int8, and "
                "export.int8_error_budget has no effect"
            )
        details = {name: plan.details() for name, plan in sorted(plans.items())}
        return FormatPlan(int8_passes(plans), problems, details)

    def usual_opset(self, model: ir.Model) -> int:
        """Return the first with Attention where there is any."""
        return ATTENTION_OPSET if has_attention(model.graph) else super().usual_opset(model)

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """Yield layers of either kind, and patch embeddings."""
        for node in low_bit_nodes(model.graph):
            yield str(node.name), unpack_linear(read_packed(node))
        for node in model.graph:
            source = _expansion(node)
            if source is not None:
                yield str(node.name), _read_expansion(*source)
        yield from read_patches(model.graph)


def int8_passes(plans: Mapping[str, Int8Plan]) -> list[ir.passes.InPlacePass]:
    """Return the passes that lower a graph as planned, layer by layer."""
    return [
        ExpandToInt8(plans),
        ExpandPatches(),
        FuseAttention(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    ]


def _expansion(node: ir.Node) -> tuple[ir.Node, int | None] | None:
    """Return the expanding product of a MatMulInteger's weight and, where it is cut, its length."""
    source = weight_source(node)
    columns = None
    if source is not None and source.op_type == "Slice":
        columns = int(constant(source, 2)[0])  # type: ignore[index]
        source = producer(source.inputs[0])
    product = None if source is None else producer(source.inputs[0])
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
    """Return a tensor of the file, as it is or before it is cast."""
    cast = producer(value)
    held = value if cast is None else cast.inputs[0]
    if held is None or held.const_value is None:
        raise ValueError("codes are no tensor of the file")
    return held.const_value


FORMAT = Int8ExpandFormat()
