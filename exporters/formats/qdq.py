"""Blocked ``DequantizeLinear`` in front of ``MatMul``: standard ONNX, no custom operator."""

from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from epmq_deploy.exporters.formats.base import ExportContext, FormatPlan, GraphFormat
from epmq_deploy.exporters.lowering.blocked_dequantize import DequantizeInBlocks
from epmq_deploy.exporters.lowering.layers import (
    constant,
)
from epmq_deploy.exporters.packing.integer_tensors import (
    read_layer,
)
from epmq_deploy.quantization.results import QuantizedLinear


class QdqFormat(GraphFormat):
    """Signed codes without zero points where symmetric, else unsigned codes with zero points."""

    name = "qdq"
    suffix = "_qdq"
    default = True
    summary = "DequantizeLinear + MatMul in standard ONNX: onnxruntime, TensorRT, OpenVINO"

    def plan(self, layers: Mapping[str, QuantizedLinear], context: ExportContext) -> FormatPlan:
        """Return a plan for all layers: whatever can be packed was measured to fuse."""
        return FormatPlan([DequantizeInBlocks(), RemoveUnusedOpsetsPass()])

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """Yield what DequantizeLinear gives to a MatMul."""
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            dequantize = weight.producer() if weight is not None else None
            if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                yield str(node.name), _read_node(dequantize)


def _read_node(dequantize: ir.Node) -> QuantizedLinear:
    scales = constant(dequantize, 1)
    codes = dequantize.inputs[0].const_value  # type: ignore[union-attr]
    if codes is None or scales is None:
        raise ValueError(f"node {dequantize.name}: codes or scales are missing")
    block = dequantize.attributes.get_int("block_size")
    return read_layer(codes, scales, constant(dequantize, 2), codes.shape.numpy()[0], block)


FORMAT = QdqFormat()
