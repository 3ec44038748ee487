"""Merge the bundled experts, quantize them with E-PMQ, export, and print what was measured.

    python examples/merge_and_quantize.py --output out

With your own experts, give the path of your recipe in place of the bundled one.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import epmq_deploy as epmq

ZOO = Path(str(files("epmq_deploy") / "zoo" / "recipe.yaml"))


def merge_and_quantize(
    recipe_file: Path, output: Path, *, samples: int = 64, test_samples: int = 200
) -> epmq.EvalReport:
    """Run the four stages, with few samples so that it takes less than a minute.

    Args:
        recipe_file: the recipe.
        output: folder that will hold the output of every stage.
        samples: calibration samples per task.
        test_samples: evaluation samples per task.
    """
    recipe = epmq.load_recipe(recipe_file)
    merged = epmq.merge(recipe, output / "merged")
    quantized = epmq.quantize(merged, output / "quantized", bits=4, samples=samples)
    exported = epmq.export(quantized, output / "exported", formats=["int8-expand"])
    return epmq.evaluate(exported, max_samples=test_samples, latency_runs=20)


def table(report: epmq.EvalReport) -> str:
    """Return one line per model: average accuracy, its 95% interval, and the size of its files."""
    lines = [f"{'':14}{'accuracy':>9}{'95% interval':>16}{'MB':>7}"]
    for row in report.rows:
        interval = f"{row.average_interval.low:.1f} to {row.average_interval.high:.1f}"
        size = "" if row.bytes is None else f"{row.bytes / 1e6:.2f}"
        lines.append(f"{row.title:14}{row.average:9.1f}{interval:>16}{size:>7}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--output", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    print(table(merge_and_quantize(arguments.recipe, arguments.output)))
