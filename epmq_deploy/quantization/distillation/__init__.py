"""Distillation: the student is trained end to end towards the experts' predictions.

Two phases, each on the experts' own calibration samples and without labels. ``distill_weights``
trains all weights before they are quantized; ``distill`` tunes scales and vectors afterwards, codes
fixed. Each keeps its result only where that is closer to the experts.
"""

from epmq_deploy.quantization.distillation.codes_fixed import distill
from epmq_deploy.quantization.distillation.quantized_training import quantize_trained
from epmq_deploy.quantization.distillation.weights import distill_weights

__all__ = ["distill", "distill_weights", "quantize_trained"]
