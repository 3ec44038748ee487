"""Check before an export whether the inputs can be exported."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.exporters.formats.base import FormatPlan
from epmq_deploy.models.deployable import Deployable
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.recipe import OPSETS

_BITS = (2, 3, 4, 8)
_ACCURACY_LEVELS = range(5)


def check_options(plans: Mapping[str, FormatPlan], opset: int | None, accuracy_level: int) -> None:
    """Check what the user chose.

    Args:
        plans: by format.
        opset: version of the default operator set, None for each format's usual one.
        accuracy_level: of MatMulNBits.

    Raises:
        RecipeError: an opset not exportable, an accuracy level there is not, or layers a format
            cannot hold.
    """
    problems: list[str] = []
    if opset is not None and opset not in OPSETS:
        problems.append(f"opset is {OPSETS[0]} to {OPSETS[-1]}, not {opset}")
    if accuracy_level not in _ACCURACY_LEVELS:
        problems.append(f"accuracy level is 0 to 4, not {accuracy_level}")
    for name, plan in plans.items():
        problems += [f"format {name}: {problem}" for problem in plan.problems]
    if problems:
        raise RecipeError("; ".join(problems))


def check_inputs(
    model: Deployable,
    example_inputs: Sequence[Tensor],
    layers: Mapping[str, QuantizedLinear],
    replaced: Mapping[str, Tensor],
) -> None:
    """Check that layers, replaced parameters and example inputs belong to the model.

    Raises:
        MismatchError: lists everything that does not.
    """
    names = model.input_names
    problems = []
    if len(example_inputs) != len(names):
        problems.append(f"{len(example_inputs)} example inputs, the model takes {list(names)}")
    if any(len(example) < 2 for example in example_inputs):
        problems.append("a batch of less than 2 example inputs would fix the batch size")
    modules = dict(model.backbone.named_modules())
    for name, layer in layers.items():
        problems += [f"layer {name}: {text}" for text in _layer_problems(modules.get(name), layer)]
    parameters = dict(model.backbone.named_parameters(remove_duplicate=False))
    for name, tensor in replaced.items():
        if name not in parameters:
            problems.append(f"replaced parameter {name}: not in the model")
        elif name.removesuffix(".weight") in layers and name.endswith(".weight"):
            problems.append(f"replaced parameter {name}: its layer is quantized")
        elif tensor.shape != parameters[name].shape or tensor.dtype != torch.float32:
            problems.append(
                f"replaced parameter {name}: {tensor.dtype} {list(tensor.shape)}, expected "
                f"{torch.float32} {list(parameters[name].shape)}"
            )
    if problems:
        raise MismatchError("cannot export", problems)


def _layer_problems(module: nn.Module | None, layer: QuantizedLinear) -> list[str]:
    if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        return [
            "no linear layer, convolution or embedding of the model "
            f"(found {type(module).__name__})"
        ]
    problems = [] if isinstance(module, nn.Linear) else _row_problems(module, layer)
    if module.weight.flatten(1).shape != layer.codes.shape:
        shapes = f"{list(layer.codes.shape)}, its weight is {list(module.weight.shape)}"
        problems.append(f"codes are {shapes}")
    groups = -(-layer.in_features // layer.group_size)
    for part in ("scales", "zero_points"):
        shape = tuple(getattr(layer, part).shape)
        if shape != (layer.out_features, groups):
            problems.append(f"{part} are {list(shape)}, not {[layer.out_features, groups]}")
    if layer.bits not in _BITS:
        problems.append(f"{layer.bits} bits; known: {_BITS}")
    elif layer.codes.numel() and int(layer.codes.max()) >= 2**layer.bits:
        problems.append(f"a code is {int(layer.codes.max())}, too large for {layer.bits} bits")
    if (layer.codes.dtype, layer.zero_points.dtype) != (torch.uint8, torch.uint8):
        problems.append("codes and zero points must be uint8")
    if layer.scales.dtype != torch.float32:
        problems.append(f"scales are {layer.scales.dtype}, not float32")
    return problems


def _row_problems(module: nn.Conv2d | nn.Embedding, layer: QuantizedLinear) -> list[str]:
    """Return what keeps a layer from being stored as INT8 with one scale per row."""
    problems = []
    if layer.bits != 8 or bool((layer.zero_points != 128).any()):
        problems.append("convolutions and embeddings are stored with 8 bits and zero point 128")
    if layer.group_size != layer.in_features:
        problems.append(
            f"group size {layer.group_size} of {layer.in_features} columns; convolutions and "
            "embeddings have one group per row"
        )
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        problems.append(f"convolution with padding mode {module.padding_mode}, not zeros")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        problems.append("embedding with max_norm, which changes its rows while it runs")
    return problems
