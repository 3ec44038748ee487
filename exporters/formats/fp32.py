"""The merged model in float32, which is always written: what all others are compared with."""

from collections.abc import Mapping

from epmq_deploy.exporters.formats.base import ExportContext, FloatFormat, FormatPlan
from epmq_deploy.quantization.results import QuantizedLinear


class Fp32Format(FloatFormat):
    """The float graph as it is."""

    name = "fp32"
    suffix = ""
    summary = "the merged model in float32, always written"

    def plan(self, layers: Mapping[str, QuantizedLinear], context: ExportContext) -> FormatPlan:
        """Return a plan without passes."""
        return FormatPlan()


FORMAT = Fp32Format()
