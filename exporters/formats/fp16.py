"""The merged model in float16, inputs and outputs in float32."""

from collections.abc import Mapping

from epmq_deploy.exporters.formats.base import ExportContext, FloatFormat, FormatPlan
from epmq_deploy.exporters.lowering.float16 import ConvertToFloat16
from epmq_deploy.quantization.results import QuantizedLinear


class Fp16Format(FloatFormat):
    """Half the size of float32; fast on GPUs and in the browser, on CPUs mostly for size."""

    name = "fp16"
    suffix = "_fp16"
    # 11 bits of precision, layer after layer.
    tolerance = 2e-2
    summary = "the merged model in float16: GPUs and the browser (WebGPU)"

    def plan(self, layers: Mapping[str, QuantizedLinear], context: ExportContext) -> FormatPlan:
        """Return a plan that converts the float graph."""
        return FormatPlan([ConvertToFloat16()])


FORMAT = Fp16Format()
