"""Time and error of quantizing the linear layers of one ViT-B/32 block, phase by phase.

    OMP_NUM_THREADS=2 python benchmarks/layer_speed.py

Inputs are random, correlated and heavy-tailed, as a block's are; targets are anchored as in E-PMQ.
Times are the best of several rounds. Errors are the layers' summed objectives relative to rounding
to nearest on the same grids and to the solver alone (GPTQ on the same target), which shows what
each sweep of refinement gains. Prints Markdown and writes ``benchmarks/results/layer_speed.json``.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import time
from pathlib import Path

import torch

from epmq_deploy.calibration.statistics import GroupSums, TaskStatistics
from epmq_deploy.quantization.base import LayerProblem, LayerWeights
from epmq_deploy.quantization.layer import quantize_layer
from epmq_deploy.quantization.methods.epmq import METHOD, EpmqOptions
from epmq_deploy.quantization.solver.gptq import solve
from epmq_deploy.quantization.solver.grid import Grid, fit_grid
from epmq_deploy.quantization.solver.refine import refine

RESULTS = Path(__file__).parent / "results"
WIDTH = 768
# Layers that share an input: their names, rows and columns.
GROUPS = (
    (("q", "k", "v"), WIDTH, WIDTH),
    (("out",), WIDTH, WIDTH),
    (("fc1",), 4 * WIDTH, WIDTH),
    (("fc2",), WIDTH, 4 * WIDTH),
)
SWEEPS = (1, 2, 3, 4, 6, 10)


def group_data(
    names: tuple[str, ...], rows: int, columns: int, seed: int
) -> tuple[list[LayerWeights], GroupSums]:
    """Weights of layers that share an input, and statistics of that input for two tasks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sums = GroupSums.zeros(columns, torch.device("cpu"))
    layers = [LayerWeights(name, normal(rows, columns) * 0.03, normal(rows)) for name in names]
    sizes = torch.exp(0.7 * normal(columns))
    mixing = normal(columns // 4, columns) * 8 / columns**0.5
    for _ in range(2):
        common = normal(3 * columns, columns // 4) * torch.logspace(0.5, -1, columns // 4)
        inputs = common @ mixing + 0.3 * normal(3 * columns, columns) + 0.3 * normal(columns)
        inputs *= sizes
        cross, output_mean, biases = {}, {}, {}
        for layer in layers:
            expert = layer.merged + 0.01 * normal(rows, columns)
            outputs = inputs @ expert.T
            cross[layer.name] = outputs.T @ inputs / len(inputs)
            output_mean[layer.name] = outputs.mean(dim=0).to(torch.float64)
            biases[layer.name] = normal(rows)
        mean = inputs.mean(dim=0).to(torch.float64)
        gram = inputs.T @ inputs / len(inputs)
        found = TaskStatistics(gram, mean, len(inputs), cross, output_mean)
        sums.add(found, METHOD.task_weight(found, EpmqOptions()), biases)
    return layers, sums


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def grid_of(problem: LayerProblem, options: EpmqOptions) -> Grid:
    return fit_grid(
        problem.weight,
        bits=options.bits,
        group_size=options.group_size,
        symmetric=options.symmetric,
        importance=problem.hessian.matrix.diagonal(),
    )


def time_phases(
    data: list[tuple[list[LayerWeights], GroupSums]], options: EpmqOptions
) -> dict[str, dict[str, float]]:
    """Seconds by shape and phase; ``refine`` is one sweep."""
    found: dict[str, dict[str, float]] = {}
    for layers, sums in data:
        clock = Clock()
        hessian = METHOD.hessian(sums, options)
        assert hessian.plain.factor is not None
        clock.lap("factor")
        for layer in layers:
            problem = METHOD.problem(layer, sums, hessian, options)
            clock.lap("target")
            grid = grid_of(problem, options)
            clock.lap("grid")
            solution = solve(problem.weight, problem.hessian, grid)
            clock.lap("solve")
            refine(
                problem.weight,
                problem.hessian.matrix,
                solution.codes,
                grid,
                objective=solution.objective,
                sweeps=1,
            )
            clock.lap("refine")
        found["/".join(layer.name for layer in layers)] = clock.seconds
    return found


def time_block(data: list[tuple[list[LayerWeights], GroupSums]], options: EpmqOptions) -> float:
    """Seconds for all layers from their sums to codes, biases and reports."""
    started = time.perf_counter()
    for layers, sums in data:
        hessian = METHOD.hessian(sums, options)
        for layer in layers:
            problem = METHOD.problem(layer, sums, hessian, options)
            quantize_layer(layer.name, layer.bias, problem, sums, options)
    return time.perf_counter() - started


def sweep_gains(
    data: list[tuple[list[LayerWeights], GroupSums]], options: EpmqOptions
) -> dict[str, float]:
    """Relative objective, summed over layers, of rounding, the solver and sweeps after it."""
    totals = dict.fromkeys(["rounding", "solver", *(f"sweeps {count}" for count in SWEEPS)], 0.0)
    for layers, sums in data:
        hessian = METHOD.hessian(sums, options)
        for layer in layers:
            problem = METHOD.problem(layer, sums, hessian, options)
            plain = options.model_copy(update={"refine": 0})
            report = quantize_layer(layer.name, layer.bias, problem, sums, plain).report
            totals["rounding"] += report.error_before
            totals["solver"] += report.error_after
            grid = grid_of(problem, options)
            solution = solve(problem.weight, problem.hessian, grid)
            codes, objective, done = solution.codes, solution.objective, 0
            for count in SWEEPS:
                refined = refine(
                    problem.weight,
                    problem.hessian.matrix,
                    codes,
                    grid,
                    objective=objective,
                    sweeps=count - done,
                    tolerance=0.0,
                )
                codes, grid, objective = refined.codes, refined.grid, refined.objective
                totals[f"sweeps {count}"] += objective / problem.size
                done = count
    return totals


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "layer_speed.json")
    arguments = parser.parse_args()
    data = [group_data(*group, seed) for seed, group in enumerate(GROUPS)]
    options = EpmqOptions(preset="paper")
    rounds = [time_phases(data, options) for _ in range(arguments.rounds)]
    phases = {
        shape: {phase: min(one[shape][phase] for one in rounds) for phase in seconds}
        for shape, seconds in rounds[0].items()
    }
    print("| layers | " + " | ".join(phases["out"]) + " |\n|---|" + "---|" * len(phases["out"]))
    for shape, seconds in phases.items():
        print(f"| {shape} | " + " | ".join(f"{value:.3f}" for value in seconds.values()) + " |")
    block = {
        str(sweeps): min(
            time_block(data, options.model_copy(update={"refine": sweeps}))
            for _ in range(arguments.rounds)
        )
        for sweeps in sorted({0, 1, options.refine})
    }
    print("\nwhole block, seconds by most sweeps:", block)
    errors = {
        bits: sweep_gains(data, options.model_copy(update={"bits": bits})) for bits in (4, 3, 2)
    }
    print("\n| bits | codes | to rounding | to the solver alone |\n|---|---|---|---|")
    for bits, totals in errors.items():
        for codes, total in totals.items():
            ratios = total / totals["rounding"], total / totals["solver"]
            print(f"| {bits} | {codes} | {ratios[0]:.4f} | {ratios[1]:.4f} |")
    result = {
        "threads": torch.get_num_threads(),
        "seconds": phases,
        "block_seconds_by_sweeps": block,
        "relative_objective": errors,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
