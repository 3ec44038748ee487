"""Embeddings and projections outside the blocks: rounded to nearest at 8 bits, where it pays.

They are a small part of a transformer's weights but, left in float32 next to 4-bit blocks, a large
part of its file. At 8 bits rounding needs no calibration.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.results import LayerReport, QuantizedLinear
from epmq_deploy.quantization.solver.gptq import round_to_nearest
from epmq_deploy.quantization.solver.grid import fit_grid

_BITS = 8
# Share of all weights; a smaller layer is not worth the operators that unpack it.
_WORTH = 0.002

_KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
_FORWARDS = tuple(kind.forward for kind in _KINDS)


@dataclass(frozen=True)
class RoundingGrid:
    """How a layer outside the blocks is rounded.

    Attributes:
        bits: per code.
        group_size: columns that share a scale.
        symmetric: whether zero points are fixed at the middle code.
    """

    bits: int
    group_size: int
    symmetric: bool


def planned_outside_blocks(
    model: nn.Module, inside: set[str], options: QuantizeOptions
) -> dict[str, RoundingGrid]:
    """Return the grids that ``quantize_outside_blocks`` will use, by dotted name.

    Args:
        model: left unmodified.
        inside: dotted names of the blocks' linear layers, left out.
        options: of the method.
    """
    total = _count(model)
    planned: dict[str, RoundingGrid] = {}
    for users in _users_by_weight(model, inside):
        if not any(_why_kept(name, user, options, total) for name, user in users.items()):
            planned |= dict.fromkeys(users, _grid_of(users, options))
    return planned


def quantize_outside_blocks(
    model: nn.Module, inside: set[str], options: QuantizeOptions
) -> tuple[dict[str, QuantizedLinear], list[LayerReport]]:
    """Quantize the layers outside the blocks, in place.

    Linear layers get groups as those in the blocks do; convolutions get one scale per output
    channel and embedding tables one per row, symmetric, because that is what standard operators
    unpack. Layers that share one weight (tied embeddings) share codes and grid: those of the
    embedding table, if there is one among them.

    Args:
        model: its weights become the dequantized ones.
        inside: dotted names of the blocks' linear layers, left alone.
        options: of the method.

    Returns:
        Codes and grids by dotted name (a convolution's weight as ``[N, C * kh * kw]``), and one
        report for every layer outside the blocks, including those kept in float.
    """
    total = _count(model)
    layers: dict[str, QuantizedLinear] = {}
    reports = []
    for users in _users_by_weight(model, inside):
        reasons = {name: _why_kept(name, user, options, total) for name, user in users.items()}
        if any(reasons.values()):
            reason = next(filter(None, reasons.values()))
            reports += [LayerReport(name, "kept", reasons[name] or reason) for name in users]
            continue
        parameter = next(iter(users.values())).get_parameter("weight")
        weight = parameter.detach().flatten(1)
        linear = _rounded(weight, _grid_of(users, options))
        parameter.data = linear.dequantize().reshape(parameter.shape).to(parameter.device)
        layers |= {name: copy.deepcopy(linear) for name in users}
        reports += [_report(name, weight, linear) for name in users]
    return layers, reports


def _users_by_weight(model: nn.Module, inside: set[str]) -> list[dict[str, nn.Module]]:
    """Return layers outside the blocks by name, grouped by the weight they share."""
    users: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if name not in inside and is_quantizable(module):
            users.setdefault(id(module.get_parameter("weight")), {})[name] = module
    return list(users.values())


def is_quantizable(module: nn.Module) -> bool:
    """Return whether a module's weight can be stored as codes."""
    return isinstance(module, _KINDS)


def _why_kept(name: str, module: nn.Module, options: QuantizeOptions, total: int) -> str:
    """Return why a layer stays in float; empty if it does not."""
    weight = module.get_parameter("weight")
    if not options.outer:
        return "outside the blocks"
    if options.skips(name):
        return "skipped by option"
    if type(module).forward not in _FORWARDS:
        # Such as scaling what is looked up.
        return f"outside the blocks, a {type(module).__name__} that does more than its weight says"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return "outside the blocks, a grouped convolution"
    if weight.numel() < _WORTH * total:
        return f"outside the blocks, {weight.numel() / total:.1%} of the weights"
    return ""


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _grid_of(users: Mapping[str, nn.Module], options: QuantizeOptions) -> RoundingGrid:
    """Return the grid of a weight that these layers share."""
    columns = next(iter(users.values())).get_parameter("weight").flatten(1).shape[1]
    per_row = not all(isinstance(user, nn.Linear) for user in users.values())
    whole = per_row or options.group_size == -1
    group_size = columns if whole else min(options.group_size, columns)
    return RoundingGrid(_BITS, group_size, per_row or options.symmetric)


def _rounded(weight: Tensor, planned: RoundingGrid) -> QuantizedLinear:
    grid = fit_grid(
        weight,
        bits=planned.bits,
        group_size=planned.group_size,
        symmetric=planned.symmetric,
        clip_search=False,
    )
    codes = round_to_nearest(weight, grid)
    return QuantizedLinear(
        codes.cpu(),
        grid.scales.cpu(),
        grid.zero_points.cpu(),
        grid.bits,
        grid.group_size,
        grid.symmetric,
    )


def _report(name: str, weight: Tensor, linear: QuantizedLinear) -> LayerReport:
    restored = linear.dequantize().to(weight.device)
    error = float((restored - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
    return LayerReport(
        name,
        "solved",
        bits=linear.bits,
        group_size=linear.group_size,
        error_before=error,
        error_after=error,
    )
