"""Conversion of a float32 graph to float16."""

import numpy as np
import onnx_ir as ir

from epmq_deploy.exporters.compat import float16_proto
from epmq_deploy.exporters.files import weightless

_LARGEST = np.finfo(np.float16).max


class ConvertToFloat16(ir.passes.InPlacePass):
    """Compute in float16 between float32 inputs and outputs.

    Operators that have no float16 form stay in float32. Before: a float32 graph. After: the same
    inputs and outputs, its initializers in float16, computed when they are written.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert."""
        outer = [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]
        # Large tensors are converted when they are written.
        graph = ir.from_proto(float16_proto(weightless(model), keep=outer)).graph
        for value in [value for value in graph.inputs if value.name not in outer]:
            tensor = model.graph.initializers[str(value.name)].const_value
            assert tensor is not None, "it was an initializer"
            graph.inputs.remove(value)
            value.const_value = tensor if value.dtype == tensor.dtype else _halved(tensor)
            graph.register_initializer(value)
        # Casts of inputs are appended behind the nodes that use them.
        graph.sort()
        model.graph = graph
        return ir.passes.PassResult(model, modified=True)


def _halved(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Return a tensor in float16, computed on demand; values too large become the largest."""

    def values() -> ir.TensorProtocol:
        clipped = np.clip(tensor.numpy(), -_LARGEST, _LARGEST)
        return ir.Tensor(clipped.astype(np.float16), name=tensor.name)

    return ir.LazyTensor(
        values,
        ir.DataType.FLOAT16,
        tensor.shape,  # type: ignore[arg-type]
        name=tensor.name,
    )
