"""Quantizing one linear layer: grid, codes, bias and a report."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.calibration.target import CalibratedOptions, LayerProblem, QuantizeOptions
from epmq_deploy.errors import NumericsError
from epmq_deploy.quantization.grid import Grid, fit_grid
from epmq_deploy.quantization.quantized_linear import QuantizedLinear
from epmq_deploy.quantization.refine import refine
from epmq_deploy.quantization.solver import Solution, Status, objective, round_to_nearest, solve


@dataclass(frozen=True)
class LayerReport:
    """How one layer fared.

    Attributes:
        layer: dotted name.
        status: the solver's; ``kept`` for a layer left in float; ``refitted`` for a norm.
        reason: why it was kept or not solved as asked; empty otherwise.
        bits: bits per weight, 0 when kept.
        group_size: columns per scale, 0 when kept.
        error_before: error of the merged weights rounded to nearest, under the layer's own
            objective, relative to ``tr(W* H W*^T)``.
        error_after: the same of the codes chosen.
        added_damping: what the solver added to the Hessian's diagonal.
        tokens: calibration tokens used.
        seconds: time spent on the layer, without gathering statistics.
    """

    layer: str
    status: Status | Literal["kept", "refitted"]
    reason: str = ""
    bits: int = 0
    group_size: int = 0
    error_before: float = 0.0
    error_after: float = 0.0
    added_damping: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's result.

    Attributes:
        linear: codes and grid, on the CPU.
        bias: re-fitted bias, float32 ``[N]``, or None where it stays as it was.
        report: how it fared.
    """

    linear: QuantizedLinear
    bias: Tensor | None
    report: LayerReport


def quantize_layer(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    problem: LayerProblem,
    sums: GroupSums,
    options: QuantizeOptions,
) -> QuantizedLayer:
    """Solve one layer.

    Args:
        name: dotted name, for the report.
        weight: the merged weight, ``[N, K]``; left unmodified.
        bias: the merged bias, ``[N]``.
        problem: target and Hessian.
        sums: statistics of the layer's inputs.
        options: bits, grid and solver options.

    Raises:
        NumericsError: the layer could not be solved as asked and no fallback is allowed.
    """
    started = time.perf_counter()
    linear, solution = _solved(name, problem, options)
    dequantized = linear.dequantize().to(torch.float64)
    before_grid = _grid(weight, problem.hessian, options)
    before = _quantized(round_to_nearest(weight, before_grid), before_grid, options)
    scale = objective(torch.zeros_like(problem.weight), problem.weight, problem.hessian)
    scale = max(scale, torch.finfo(torch.float64).tiny)
    report = LayerReport(
        layer=name,
        status=solution.status,
        reason=_reason(solution.status),
        bits=options.bits,
        group_size=linear.group_size,
        error_before=objective(problem.weight, before.dequantize(), problem.hessian) / scale,
        error_after=objective(problem.weight, dequantized, problem.hessian) / scale,
        added_damping=solution.added_damping,
        tokens=sums.tokens,
        seconds=time.perf_counter() - started,
    )
    if not math.isfinite(report.error_after):
        raise NumericsError(f"layer {name}: its quantization error is not finite")
    new_bias = None
    if bias is not None and isinstance(options, CalibratedOptions) and options.bias:
        new_bias = fit_bias(name, bias, dequantized, problem, sums)
    return QuantizedLayer(_on_cpu(linear), new_bias, report)


def _solved(
    name: str, problem: LayerProblem, options: QuantizeOptions
) -> tuple[QuantizedLinear, Solution]:
    """Codes and grid after solver and refinement, and what the solver said."""
    grid = _grid(problem.weight, problem.hessian, options)
    if not isinstance(options, CalibratedOptions):
        solution = solve(problem.weight, problem.hessian, grid)
        return _quantized(solution.codes, grid, options), solution
    try:
        solution = solve(
            problem.weight,
            problem.hessian,
            grid,
            act_order=options.act_order,
            allow_fallback=options.allow_fallback,
        )
    except NumericsError as error:
        raise NumericsError(f"layer {name}: {error}") from error
    codes = solution.codes
    if options.refine and solution.status != "fallback_rtn":
        damped = problem.hessian.clone()
        damped.diagonal().add_(solution.added_damping)
        codes, grid = refine(problem.weight, damped, codes, grid, sweeps=options.refine)
    return _quantized(codes, grid, options), solution


def fit_bias(
    name: str, bias: Tensor, dequantized: Tensor, problem: LayerProblem, sums: GroupSums
) -> Tensor:
    """Least-squares bias for fixed quantized weights, float32 ``[N]``.

    ``b = (sum_t s_t (target mean_t - Q mu_t) + damping b_A) / (sum_t s_t + damping)``, where the
    target's mean output is the experts' for guided targets and the merged layer's otherwise.

    Args:
        name: layer whose sums are used.
        bias: merged bias ``[N]``.
        dequantized: float64 ``[N, K]``.
        problem: the layer's target and damping.
        sums: statistics of the layer's inputs.
    """
    target = sums.output_mean.get(name)
    if target is None:
        target = problem.weight @ sums.mean + sums.weight * bias.to(torch.float64)
    anchor = (bias if problem.bias_anchor is None else problem.bias_anchor).to(torch.float64)
    missing = target - dequantized @ sums.mean + problem.bias_damping * anchor
    return (missing / (sums.weight + problem.bias_damping)).to(torch.float32)


def _grid(weight: Tensor, hessian: Tensor, options: QuantizeOptions) -> Grid:
    columns = weight.shape[1]
    return fit_grid(
        weight,
        bits=options.bits,
        group_size=columns if options.group_size == -1 else min(options.group_size, columns),
        symmetric=options.symmetric,
        importance=hessian.diagonal(),
        clip_search=options.clip_search,
    )


def _quantized(codes: Tensor, grid: Grid, options: QuantizeOptions) -> QuantizedLinear:
    return QuantizedLinear(
        codes, grid.scales, grid.zero_points, options.bits, grid.group_size, options.symmetric
    )


def _on_cpu(linear: QuantizedLinear) -> QuantizedLinear:
    return QuantizedLinear(
        linear.codes.cpu(),
        linear.scales.cpu(),
        linear.zero_points.cpu(),
        linear.bits,
        linear.group_size,
        linear.symmetric,
    )


def _reason(status: Status) -> str:
    return {
        "solved": "",
        "damping_raised": "the Hessian was not positive definite as given",
        "fallback_rtn": "the Hessian could not be factored; rounded to nearest as allowed",
    }[status]
