"""Quantizing trained weights: their own outputs are what each layer aims at."""

from functools import partial

import torch
from torch import nn

from epmq_deploy.data.samples import batches
from epmq_deploy.options.quantization import CalibratedOptions, QuantizeOptions
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.methods.gptq import METHOD, GptqOptions
from epmq_deploy.quantization.results import QuantizedModel
from epmq_deploy.quantization.sequential import FinishedBlocks, quantize_model


def quantize_trained(
    model: nn.Module,
    options: QuantizeOptions,
    ctx: CalibrationContext,
    finished: FinishedBlocks | None = None,
) -> QuantizedModel:
    """Quantize trained weights in place, whatever the merged model's are.

    Layers aim at the trained weights on the inputs that the quantized model has (``W* = W``), not
    at experts: training has settled what is best for all of them together.

    Args:
        model: trained; its weights become the dequantized ones.
        options: bits, grid, samples and arithmetic are taken over from these.
        ctx: samples.
        finished: results of blocks done before.

    Returns:
        Codes and grids, and every other parameter of the model that training may have moved.

    Raises:
        NumericsError: a layer could not be solved as asked; names it.
    """
    trained = dict(model.named_parameters())
    size = QUANTIZATION_METHODS[options.method].calibration(options).batch_size
    result = quantize_model(
        model,
        ctx.family,
        METHOD,
        gptq_options(options),
        batches={
            task: partial(batches, samples, ctx.family, ctx.folder, size)
            for task, samples in ctx.samples.items()
        },
        finished=finished,
        progress=ctx.progress,
        scratch=ctx.scratch,
    )
    codes = {f"{name}.weight" for name in result.layers}
    shared = {id(model.get_parameter(name)) for name in codes}
    result.replaced = {
        name: value.detach().to("cpu", torch.float32, copy=True)
        for name, value in trained.items()
        if id(value) not in shared
    }
    return result


def gptq_options(options: QuantizeOptions) -> GptqOptions:
    """Return GPTQ's options with what another method's options share with them.

    Tokens that no head reads weigh as little as they do for that method, and products are computed
    in the same dtype.
    """
    settings = QUANTIZATION_METHODS[options.method].calibration(options)
    fields = CalibratedOptions.model_fields
    shared = {name: value for name, value in options if name in fields}
    shared["method"] = METHOD.name
    shared["unpooled_weight"] = settings.unpooled
    shared["products"] = str(settings.products).removeprefix("torch.")
    return GptqOptions.model_validate(shared)
