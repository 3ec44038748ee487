"""Decide which layers to compute in int8, and scale their inputs so that the error is smallest.

Activations are quantized per tensor, weights per output channel. With inputs divided and weights
multiplied by ``s`` per input channel (SmoothQuant, Xiao et al., arXiv 2211.10438), a step ``D`` of
the activations and steps ``c_n`` of the weights, rounding adds to the outputs of one token, in
expectation and with errors taken as uniform and independent,

    D^2 / 12  sum_nk (W_nk s_k)^2  +  sum_n c_n^2 / 12  sum_k E[x_k^2] / s_k^2

which is compared with the squared norm of the outputs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from epmq_deploy.models.blocks import Group
from epmq_deploy.quantization.results import LayerInputs, QuantizedLinear

Activations = Literal["dynamic", "static"]

_ACTIVATION_STEPS = 255
_WEIGHT_STEPS = 127
# SmoothQuant's migration strengths; 0 would scale by weights alone.
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Factors are kept within this many times the typical one: what calibration hardly saw of a channel
# must not decide how it is scaled.
_SPREAD = 32.0
_FACTOR_LEVELS = 127
# A factor that no norm can take in costs a multiplication on every run; worth it below this part
# of the error without.
_WORTH_A_MUL = 0.7


@dataclass(frozen=True)
class Int8Plan:
    """How one layer runs.

    Attributes:
        integer: as integer GEMM; otherwise it stays MatMulNBits.
        error: expected error of the outputs in int8, root mean square relative to the outputs;
            None without statistics of the inputs.
        factors: what inputs are divided and weights multiplied by, float32 ``[K]``; None for ones.
        strength: SmoothQuant's migration strength; None without factors.
        span: smallest and largest input after division; None where they are measured on each run.
    """

    integer: bool
    error: float | None = None
    factors: Tensor | None = None
    strength: float | None = None
    span: tuple[float, float] | None = None

    def details(self) -> dict[str, Any]:
        """Plain data for reports."""
        return {
            "kernel": "int8" if self.integer else "MatMulNBits",
            "int8_error": self.error,
            "smoothing": self.strength,
            "activations": None if not self.integer else "static" if self.span else "dynamic",
        }


def plan_layers(
    layers: Mapping[str, QuantizedLinear],
    inputs: Mapping[str, LayerInputs],
    groups: Iterable[Group],
    activations: Activations,
    budget: float,
) -> dict[str, Int8Plan]:
    """Plan every layer; those without statistics run in int8, unscaled and with dynamic ranges.

    Args:
        layers: linear layers by dotted name.
        inputs: what is known of their inputs.
        groups: layers that share an input, and so its scaling.
        activations: whether ranges are measured on each run or taken from calibration.
        budget: largest relative error of a layer in int8.
    """
    plans = {}
    for group in groups:
        names = [name for name in group.layers if name in layers and name in inputs]
        if not names:
            continue
        seen = inputs[names[0]]
        weights = {name: layers[name].dequantize() for name in names}
        outputs = [inputs[name].output for name in names]
        smoothed = _smooth(list(weights.values()), outputs, seen, normed=group.norm is not None)
        strength, factors = smoothed
        for name, weight in weights.items():
            error = int8_error(weight, inputs[name], factors)
            plans[name] = Int8Plan(
                error <= budget,
                error,
                factors,
                strength,
                _span(seen, factors) if activations == "static" else None,
            )
    return plans | {name: Int8Plan(integer=True) for name in layers.keys() - plans.keys()}


def int8_error(weight: Tensor, inputs: LayerInputs, factors: Tensor | None = None) -> float:
    """Return expected error of a layer's outputs in int8, root mean square relative to the outputs.

    Args:
        weight: float32 ``[N, K]``.
        inputs: of the layer.
        factors: what inputs are divided and weights multiplied by, ``[K]``.
    """
    return math.sqrt(_squared_error(weight, inputs, factors) / max(inputs.output, 1e-30))


def channel_scales(weight: Tensor, factors: Tensor | None = None) -> Tensor:
    """Step of each output channel's int8 weights, float32 ``[N]``; 1 for a channel of zeros."""
    scaled = weight if factors is None else weight * factors
    largest = torch.maximum(scaled.amax(dim=1), -scaled.amin(dim=1))
    return torch.where(largest > 0, largest / _WEIGHT_STEPS, torch.ones_like(largest))


def activation_grid(span: tuple[float, float]) -> tuple[float, int]:
    """Scale and zero point of uint8 activations from their range, as DynamicQuantizeLinear's."""
    scale = (span[1] - span[0]) / _ACTIVATION_STEPS or 1.0
    return scale, min(max(round(-span[0] / scale), 0), _ACTIVATION_STEPS)


def _smooth(
    weights: Sequence[Tensor], outputs: Sequence[float], seen: LayerInputs, *, normed: bool
) -> tuple[float | None, Tensor | None]:
    """Strength and factors with the least error over a group's layers; None where it is nothing."""

    def error(factors: Tensor | None) -> float:
        return sum(
            _squared_error(weight, seen, factors) / max(output, 1e-30)
            for weight, output in zip(weights, outputs, strict=True)
        )

    largest_weight = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    largest_input = torch.maximum(-seen.low, seen.high)
    tried = {
        strength: smoothing_factors(largest_input, largest_weight, strength)
        for strength in _STRENGTHS
    }
    errors = {strength: error(factors) for strength, factors in tried.items()}
    best = min(errors, key=errors.__getitem__)
    enough = 1.0 if normed else _WORTH_A_MUL**2
    return (best, tried[best]) if errors[best] < enough * error(None) else (None, None)


def smoothing_factors(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """``inputs^strength / weights^(1 - strength)`` per channel, around 1 (SmoothQuant, eq. 4).

    Rounded to int8 multiples of a power of two, which is how a file holds them
    (`factor_levels`); division of the inputs and multiplication of the weights agree exactly.

    Args:
        inputs: largest absolute input of each channel, ``[K]``.
        weights: largest absolute weight of each channel, ``[K]``.
        strength: 0 to 1; 1 makes all inputs equally large.
    """
    tiny = torch.finfo(torch.float32).tiny
    logs = strength * inputs.clamp(min=tiny).log() - (1 - strength) * weights.clamp(min=tiny).log()
    factors = (logs - logs.median()).exp().clamp(1 / _SPREAD, _SPREAD)
    unit = _factor_unit(factors)
    return (factors / unit).round().clamp(1, _FACTOR_LEVELS) * unit


def factor_levels(factors: Tensor) -> tuple[Tensor, float]:
    """Smoothing factors as int8 ``[K]`` times one power of two."""
    unit = _factor_unit(factors)
    return (factors / unit).to(torch.int8), unit


def _factor_unit(factors: Tensor) -> float:
    return float(2.0 ** math.ceil(math.log2(float(factors.max()) / _FACTOR_LEVELS)))


def _squared_error(weight: Tensor, inputs: LayerInputs, factors: Tensor | None) -> float:
    scaled = weight if factors is None else weight * factors
    squares = inputs.square if factors is None else inputs.square / factors.square()
    low, high = _span(inputs, factors)
    step = (high - low) / _ACTIVATION_STEPS
    from_inputs = step**2 * float(scaled.square().sum())
    from_weights = float(channel_scales(scaled).square().sum()) * float(squares.sum())
    return (from_inputs + from_weights) / 12


def _span(inputs: LayerInputs, factors: Tensor | None) -> tuple[float, float]:
    """Range of the inputs, zero included, as uint8 activations have to span it."""
    low = inputs.low if factors is None else inputs.low / factors
    high = inputs.high if factors is None else inputs.high / factors
    return min(0.0, float(low.min())), max(0.0, float(high.max()))
