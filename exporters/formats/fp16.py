"""The merged model in float16, inputs and outputs in float32.

Converted by ``onnxruntime.transformers.float16``, which leaves operators that have no float16 form
in float32.
"""

import numpy as np
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from epmq_deploy.exporters.formats.base import FloatFormat
from epmq_deploy.exporters.graphs.files import weightless

_LARGEST = np.finfo(np.float16).max


class Fp16Format(FloatFormat):
    """Half the size of float32; fast on GPUs and in the browser, on CPUs mostly for size."""

    name = "fp16"
    suffix = "_fp16"
    # 11 bits of precision, layer after layer.
    tolerance = 2e-2
    summary = "the merged model in float16: GPUs and the browser (WebGPU)"

    def lower(self, model: ir.Model) -> None:
        """See base."""
        outer = [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]
        # Large tensors are converted when they are written. Shapes are in the graph; inferring them
        # again would serialize it.
        converted = convert_float_to_float16(
            weightless(model), keep_io_types=outer, disable_shape_infer=True
        )
        graph = ir.from_proto(converted).graph
        for value in [value for value in graph.inputs if value.name not in outer]:
            tensor = model.graph.initializers[str(value.name)].const_value
            assert tensor is not None, "it was an initializer"
            graph.inputs.remove(value)
            value.const_value = tensor if value.dtype == tensor.dtype else _halved(tensor)
            graph.register_initializer(value)
        # Casts of inputs are appended behind the nodes that use them.
        graph.sort()
        model.graph = graph


def _halved(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """In float16, computed when it is asked for; what is too large becomes the largest there is."""

    def values() -> ir.TensorProtocol:
        clipped = np.clip(tensor.numpy(), -_LARGEST, _LARGEST)
        return ir.Tensor(clipped.astype(np.float16), name=tensor.name)

    return ir.LazyTensor(
        values,
        ir.DataType.FLOAT16,
        tensor.shape,  # type: ignore[arg-type]
        name=tensor.name,
    )


FORMAT = Fp16Format()
