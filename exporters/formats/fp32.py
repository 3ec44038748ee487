"""The merged model in float32, which is always written: what all others are compared with."""

import onnx_ir as ir

from epmq_deploy.exporters.formats.base import FloatFormat


class Fp32Format(FloatFormat):
    """The float graph as it is."""

    name = "fp32"
    suffix = ""
    summary = "the merged model in float32, always written"

    def lower(self, model: ir.Model) -> None:
        """See base: nothing to do."""


FORMAT = Fp32Format()
