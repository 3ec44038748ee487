"""Compare merge methods on the bundled experts: merged in fp32, and quantized to 4 bits.

    python examples/compare_methods.py --output out task_arithmetic ties tsv_m

Differences inside the printed intervals say nothing; evaluate more samples to see more.
"""

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import epmq_deploy as epmq

ZOO = Path(str(files("epmq_deploy") / "zoo" / "recipe.yaml"))
METHODS = ("task_arithmetic", "tsv_m")


def compare_methods(
    recipe_file: Path,
    output: Path,
    methods: Sequence[str] = METHODS,
    *,
    samples: int = 16,
    test_samples: int = 200,
) -> dict[str, epmq.EvalReport]:
    """Run the chain once per merge method; return the reports by method.

    Args:
        recipe_file: the recipe.
        output: folder that will hold one folder per method.
        methods: names of merge methods, see ``epmq merge --list``.
        samples: calibration samples per task.
        test_samples: evaluation samples per task.
    """
    recipe = epmq.load_recipe(recipe_file)
    reports = {}
    for method in methods:
        folder = output / method
        merged = epmq.merge(recipe, folder / "merged", method=method)
        quantized = epmq.quantize(merged, folder / "quantized", samples=samples)
        exported = epmq.export(quantized, folder / "exported", formats=["matmulnbits"])
        reports[method] = epmq.evaluate(
            exported, max_samples=test_samples, experts=False, latency_runs=1
        )
    return reports


def table(reports: dict[str, epmq.EvalReport]) -> str:
    """Return one line per merge method: average accuracy with its 95% interval."""
    lines = [f"{'':20}{'fp32 merged':>22}{'4 bits':>22}"]
    for method, report in reports.items():
        line = f"{method:20}"
        for row in (report.row("fp32"), report.row("matmulnbits")):
            low, high = row.average_interval.low, row.average_interval.high
            line += f"{f'{row.average:.1f} ({low:.1f} to {high:.1f})':>22}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--output", type=Path, default=Path("out-methods"))
    arguments = parser.parse_args()
    print(table(compare_methods(arguments.recipe, arguments.output, arguments.methods)))
