"""Quantizing one linear layer: grid, codes, bias and a report."""

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from epmq_deploy.calibration.statistics import GroupSums
from epmq_deploy.errors import NumericsError
from epmq_deploy.options.quantization import QuantizeOptions, SolverSettings
from epmq_deploy.quantization.base import LayerProblem
from epmq_deploy.quantization.results import (
    LayerInputs,
    LayerReport,
    QuantizedLayer,
    QuantizedLinear,
)
from epmq_deploy.quantization.solver.gptq import (
    Solution,
    Status,
    round_to_nearest,
    rounding_error,
    solve,
)
from epmq_deploy.quantization.solver.grid import Grid, fit_grid
from epmq_deploy.quantization.solver.hessian import Hessian
from epmq_deploy.quantization.solver.refine import refine


def quantize_layer(
    name: str,
    bias: Tensor | None,
    problem: LayerProblem,
    sums: GroupSums,
    options: QuantizeOptions,
) -> QuantizedLayer:
    """Solve one layer.

    Args:
        name: dotted name, for the report.
        bias: the merged bias, ``[N]``.
        problem: target and Hessian; left unmodified.
        sums: statistics of the layer's inputs.
        options: bits, grid and solver options.

    Raises:
        NumericsError: the layer could not be solved as asked and no fallback is allowed.
    """
    started = time.perf_counter()
    grid = fit_grid(
        problem.weight,
        bits=options.bits,
        group_size=_group_size(problem.weight, options),
        symmetric=options.symmetric,
        importance=problem.hessian.matrix.diagonal(),
        clip_search=options.clip_search,
    )
    # Only reported, so float32 is enough.
    before = problem.hessian.quadratic(rounding_error(problem.weight, grid))
    if settings := options.solver_settings:
        solution, grid = _solved(name, problem, grid, settings)
    else:
        solution = Solution(round_to_nearest(problem.weight, grid), "solved", 0.0, before)
    linear = QuantizedLinear(
        solution.codes, grid.scales, grid.zero_points, grid.bits, grid.group_size, grid.symmetric
    )
    size = max(problem.size, torch.finfo(torch.float64).tiny)
    if not math.isfinite(solution.objective):
        raise NumericsError(f"layer {name}: its quantization error is not finite")
    new_bias = refit_bias(name, bias, linear.dequantize(), problem, sums, options)
    report = LayerReport(
        layer=name,
        status=solution.status,
        reason=_reason(solution.status),
        bits=options.bits,
        group_size=linear.group_size,
        error_before=before / size,
        error_after=solution.objective / size,
        added_damping=solution.added_damping,
        tokens=sums.tokens,
        seconds=time.perf_counter() - started,
    )
    return QuantizedLayer(_on_cpu(linear), new_bias, report)


def _solved(
    name: str, problem: LayerProblem, grid: Grid, settings: SolverSettings
) -> tuple[Solution, Grid]:
    """Return codes and grid after solver and refinement."""
    try:
        solution = solve(
            problem.weight, problem.hessian, grid, allow_fallback=settings.allow_fallback
        )
    except NumericsError as error:
        raise NumericsError(f"layer {name}: {error}") from error
    if not settings.refine or solution.status == "fallback_rtn":
        return solution, grid
    refined = refine(
        problem.weight,
        problem.hessian.damped,
        solution.codes,
        grid,
        objective=solution.objective,
        sweeps=settings.refine,
    )
    solution = replace(solution, codes=refined.codes, objective=refined.objective)
    return solution, refined.grid


def refit_bias(
    name: str,
    bias: Tensor | None,
    weight: Tensor,
    problem: LayerProblem,
    sums: GroupSums,
    options: QuantizeOptions,
) -> Tensor | None:
    """Return ``fit_bias`` where the options ask for it and there are activations; else None."""
    if bias is None or not options.refits_biases or not sums.tokens:
        return None
    return fit_bias(name, bias, weight, problem, sums)


def fit_bias(
    name: str, bias: Tensor, dequantized: Tensor, problem: LayerProblem, sums: GroupSums
) -> Tensor:
    """Return the least-squares bias for fixed quantized weights, float32 ``[N]``.

    ``b = (sum_t s_t (target mean_t - Q mu_t) + damping b_A) / (sum_t s_t + damping)``, where the
    mean output aimed at is the experts' for methods that use experts, else the merged layer's.

    Args:
        name: layer whose sums are used.
        bias: merged bias ``[N]``.
        dequantized: float ``[N, K]``.
        problem: the layer's target and damping.
        sums: statistics of the layer's inputs.
    """
    target = sums.output_mean.get(name)
    if target is None:
        target = problem.weight.to(torch.float64) @ sums.mean + sums.weight * bias.to(torch.float64)
    anchor = (bias if problem.bias_anchor is None else problem.bias_anchor).to(torch.float64)
    missing = target - dequantized.to(torch.float64) @ sums.mean + problem.bias_damping * anchor
    return (missing / (sums.weight + problem.bias_damping)).to(torch.float32)


def layer_inputs(sums: GroupSums, weight: Tensor) -> LayerInputs | None:
    """Return ranges and energy of the inputs of a layer; None without activations.

    Args:
        sums: statistics of its inputs.
        weight: dequantized, float32 ``[N, K]``.
    """
    if sums.low is None or sums.high is None:
        return None
    # Codes are on the CPU, statistics where models run.
    energy = Hessian(sums.gram, dtype=weight.dtype).quadratic(weight.to(sums.gram.device))
    return LayerInputs(
        sums.low.cpu(),
        sums.high.cpu(),
        (sums.gram.diagonal() / sums.weight).to(torch.float32).cpu(),
        energy / sums.weight,
    )


def _group_size(weight: Tensor, options: QuantizeOptions) -> int:
    columns = weight.shape[1]
    return columns if options.group_size == -1 else min(options.group_size, columns)


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
