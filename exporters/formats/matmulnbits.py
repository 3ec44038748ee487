"""``com.microsoft::MatMulNBits``: onnxruntime's own low-bit operator."""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from epmq_deploy.exporters.formats.base import ExportContext, FormatPlan, GraphFormat
from epmq_deploy.exporters.lowering.layers import low_bit_nodes, read_packed
from epmq_deploy.exporters.lowering.naming import ShareRuns
from epmq_deploy.exporters.packing.packed_linear import unpack_linear
from epmq_deploy.quantization.results import QuantizedLinear


class MatMulNBitsFormat(GraphFormat):
    """The graph that is exported, as it is."""

    name = "matmulnbits"
    suffix = "_q4"
    summary = "MatMulNBits nodes: onnxruntime on CPU, CUDA and in the browser (WebGPU)"
    default = True
    stores_two_bits = True

    def plan(self, layers: Mapping[str, QuantizedLinear], context: ExportContext) -> FormatPlan:
        """Return a plan; packing has checked all that the operator demands."""
        return FormatPlan([ShareRuns()])

    def read(self, model: ir.Model) -> Iterator[tuple[str, QuantizedLinear]]:
        """Yield what the MatMulNBits nodes multiply by."""
        for node in low_bit_nodes(model.graph):
            yield str(node.name), unpack_linear(read_packed(node))


FORMAT = MatMulNBitsFormat()
