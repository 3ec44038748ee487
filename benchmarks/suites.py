"""Accuracy of every method on one suite: bits, merges, calibration seeds, sample counts.

    python benchmarks/suites.py                                   # the bundled zoo
    python benchmarks/suites.py --recipe RECIPE.yaml --name text  # e.g. that of text_suite.py

Scores test samples, in torch. Writes ``benchmarks/results/suite_NAME.json`` after every figure, so
that an interrupted run goes on where it stopped, and prints the tables as Markdown.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from methods import RESULTS, ZOO, Suite, load_suite, measure

from epmq_deploy.cli.run import assign
from epmq_deploy.recipe import load_recipe, override

MERGES = {"task_arithmetic": (), "ties": ("merge.method=ties",)}
METHODS = {
    "RTN": "rtn",
    "GPTQ": "gptq",
    "GPTAQ": "gptaq",
    "E-PMQ paper": "epmq,preset=paper",
    "E-PMQ features": "epmq,preset=features",
    "E-PMQ weights": "epmq,preset=weights",
    "E-PMQ default": "epmq",
}
# Measured with several seeds and sample counts.
FOLLOWED = ("GPTQ", "E-PMQ paper", "E-PMQ features", "E-PMQ default")
BITS = (4, 3, 2)
SEEDS = (0, 1, 2)
SAMPLES = (8, 32, 128, 256)
# Seeds choose among a task's calibration samples, so not all of them may be used.
SEED_SAMPLES = 128


class Store:
    """Figures by key, written to a file whenever one is added.

    Args:
        file: JSON; figures already in it are not measured again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.figures: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def add(self, key: str, value: Any) -> None:
        """Add a figure and write the file."""
        self.figures[key] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.figures, indent=2) + "\n")
        print(f"{key}: {value}", flush=True)


def measure_merge(store: Store, name: str, suite: Suite, rounded_only: bool) -> None:
    """All figures of one merge that are not in the store yet."""

    def figure(key: str, variant: str, used: Suite) -> None:
        if key not in store.figures:
            store.add(key, measure(used, variant)["average"])

    if f"{name}/fp32" not in store.figures:
        store.add(f"{name}/fp32", suite.average(suite.family.load(suite.folder)))
    for bits in BITS:
        for method, variant in METHODS.items():
            figure(f"{name}/{method}/{bits}", f"{variant},bits={bits}", suite)
    figure(f"{name}/E-PMQ default/unrounded", "epmq,rounding=false", suite)
    figure(f"{name}/E-PMQ default/auto", "epmq,anchor=auto", suite)
    if rounded_only:
        return
    for seed in SEEDS:
        for method in FOLLOWED:
            key = f"{name}/{method}/4/seed{seed}"
            if key not in store.figures:
                used = recalibrated(suite, SEED_SAMPLES, seed)
                figure(key, METHODS[method], used)
    for samples in SAMPLES:
        for method in FOLLOWED:
            key = f"{name}/{method}/4/samples{samples}"
            if key not in store.figures:
                figure(key, METHODS[method], recalibrated(suite, samples, 0))


def recalibrated(suite: Suite, samples: int, seed: int) -> Suite:
    """The suite with other calibration samples."""
    recipe = override(suite.recipe, "quantize", {"samples": samples, "seed": seed})
    return suite.with_calibration(recipe)


def tables(figures: dict[str, Any], merges: list[str]) -> str:
    """The figures as Markdown."""
    lines = [
        f"experts {figures['experts']:.1f}, base {figures['base']:.1f}",
        "",
        "| merge | fp32 merged | bits | " + " | ".join(METHODS) + " |",
        "|---|--:|--:|" + "--:|" * len(METHODS),
    ]
    for merge in merges:
        for bits in BITS:
            row = [f"{figures[f'{merge}/{method}/{bits}']:.2f}" for method in METHODS]
            fp32 = f"{figures[f'{merge}/fp32']:.2f}"
            lines.append(f"| {merge} | {fp32} | {bits} | " + " | ".join(row) + " |")
    first = merges[0]
    lines += ["", f"4 bits, {first}, {SEED_SAMPLES} samples a task, seeds {SEEDS}:", ""]
    for method in FOLLOWED:
        found = [figures[f"{first}/{method}/4/seed{seed}"] for seed in SEEDS]
        mean = sum(found) / len(found)
        lines.append(f"- {method}: {mean:.2f} ({min(found):.2f} to {max(found):.2f})")
    lines += ["", f"4 bits, {first}, by samples a task:", ""]
    lines += ["| method | " + " | ".join(map(str, SAMPLES)) + " |", "|---|" + "--:|" * len(SAMPLES)]
    for method in FOLLOWED:
        row = [f"{figures[f'{first}/{method}/4/samples{count}']:.2f}" for count in SAMPLES]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--name", default="zoo")
    parser.add_argument("--set", action="append", default=[], metavar="section.option=value")
    arguments = parser.parse_args()
    store = Store(RESULTS / f"suite_{arguments.name}.json")
    for index, (name, settings) in enumerate(MERGES.items()):
        recipe = assign(load_recipe(arguments.recipe), [*arguments.set, *settings])
        with tempfile.TemporaryDirectory() as work:
            suite = load_suite(recipe, Path(work) / "merged", held_back=False)
            if "experts" not in store.figures:
                store.add("experts", suite.experts_average())
                base = suite.family.load(Path(recipe.base.path))
                store.add("base", suite.average(base))
            measure_merge(store, name, suite, rounded_only=index > 0)
    print(tables(store.figures, list(MERGES)))


if __name__ == "__main__":
    main()
