"""What quantizing a model, or some of its blocks, yields."""

from dataclasses import dataclass, field

from torch import Tensor

from epmq_deploy.quantization.layer import LayerReport
from epmq_deploy.quantization.layer_inputs import LayerInputs
from epmq_deploy.quantization.quantized_linear import QuantizedLinear


@dataclass
class QuantizedModel:
    """What quantizing a model, or some of its blocks, yields.

    Attributes:
        layers: codes and grids by layer name.
        replaced: parameters given new values (re-fitted biases and norms), by parameter name.
        reports: one per layer quantized or norm re-fitted, in running order, then those kept.
        errors: per layer its error by width, where widths were probed.
        inputs: what calibration saw of a layer's inputs, by layer name; none without activations.
    """

    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    inputs: dict[str, LayerInputs] = field(default_factory=dict)

    def extend(self, other: "QuantizedModel") -> None:
        """Add the results of further blocks."""
        self.layers |= other.layers
        self.replaced |= other.replaced
        self.reports += other.reports
        self.errors |= other.errors
        self.inputs |= other.inputs
