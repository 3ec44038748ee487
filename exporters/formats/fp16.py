"""The merged model in float16, inputs and outputs in float32.

Converted by ``onnxruntime.transformers.float16``, which leaves operators that have no float16 form
in float32.
"""

import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from epmq_deploy.exporters.formats.format import FloatFormat


class Fp16Format(FloatFormat):
    """Half the size of float32; fast on GPUs and in the browser, on CPUs mostly for size."""

    name = "fp16"
    suffix = "_fp16"
    # 11 bits of precision, layer after layer.
    tolerance = 2e-2
    summary = "the merged model in float16: GPUs and the browser (WebGPU)"

    def lower(self, model: ir.Model) -> None:
        """See base."""
        # Shapes are in the graph; inferring them again would serialize it, up to 2 GiB only.
        converted = convert_float_to_float16(
            ir.to_proto(model), keep_io_types=True, disable_shape_infer=True
        )
        model.graph = ir.from_proto(converted).graph
        # Casts of inputs are appended behind the nodes that use them.
        model.graph.sort()


FORMAT = Fp16Format()
