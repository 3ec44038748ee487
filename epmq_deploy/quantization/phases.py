"""The phases of quantizing with settled options: weights are trained, quantized, then tuned.

Training and tuning are optional; see ``distillation``.
"""

from typing import TypedDict

from torch import nn

from epmq_deploy.artifacts.manifest import Distillation, WeightDistillation
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.distillation import distill, distill_weights, quantize_trained
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.resume import FinishedWork


class Distillations(TypedDict, total=False):
    """What was distilled; fields of ``QuantizeDetails``."""

    distill_weights: WeightDistillation
    distill: Distillation


def quantize_in_phases(
    options: QuantizeOptions, ctx: CalibrationContext, finished: FinishedWork | None = None
) -> tuple[nn.Module, QuantizedModel, Distillations]:
    """Quantize the merged model as the options say.

    Args:
        options: of the method; none is left to be searched for.
        ctx: samples and experts, with heads where the options need them.
        finished: what an interrupted run has finished; further work is added to it.

    Returns:
        The model with dequantized weights, its codes and parameters, and what was distilled.

    Raises:
        RecipeError: there are too few samples for what the options ask.
        NumericsError: a layer could not be solved as asked; names it.
    """
    method = QUANTIZATION_METHODS[options.method]
    distilled: Distillations = {}
    trained = None
    if epochs := method.weight_distillation_epochs(options):
        trained, distilled["distill_weights"] = distill_weights(options, ctx, epochs, finished)
    if trained is None:
        rank = method.residual_rank(options)
        model, quantized = ctx.calibrate(options, finished=finished, residual_rank=rank)
    else:
        model, quantized = trained, quantize_trained(trained, options, ctx, finished)
    if epochs := method.distillation_epochs(options):
        products = method.products_dtype(options)
        quantized, distilled["distill"] = distill(model, quantized, ctx, epochs, products)
    return model, quantized, distilled
