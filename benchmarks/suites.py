"""Accuracy of every method on one suite: bits, merges, calibration seeds, sample counts.

    python benchmarks/suites.py                                   # the bundled zoo
    python benchmarks/suites.py --recipe RECIPE.yaml --name text  # e.g. that of text_suite.py
    python benchmarks/suites.py --recipe ... --name text_other --merge task_arithmetic --only '/4$'

Scores test samples, in torch: percent correct, and of values the rank correlation times 100. Writes
``benchmarks/results/suite_NAME.json`` after every figure, so that an interrupted run goes on where
it stopped, and prints the tables as Markdown.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
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
    "E-PMQ outputs": "epmq,preset=outputs",
    "E-PMQ balanced": "epmq,effort=balanced",
    "E-PMQ best": "epmq,effort=best",
}
# Measured below 4 bits too.
NARROW = ("RTN", "GPTQ", "E-PMQ paper", "E-PMQ outputs", "E-PMQ balanced", "E-PMQ best")
# Measured with several seeds and sample counts.
FOLLOWED = ("GPTQ", "E-PMQ paper", "E-PMQ outputs", "E-PMQ balanced", "E-PMQ best")
OUTPUTS = "E-PMQ outputs"
BITS = (4, 3, 2)
# Bits per weight on average, chosen per layer.
MIXED = (3.0, 2.5)
SEEDS = (0, 1, 2)
SAMPLES = (8, 32, 128, 256)
# Epochs of distillation.
EPOCHS = 2
# Seeds choose among a task's calibration samples, so not all of them may be used.
SEED_SAMPLES = 128


class Store:
    """Figures by key, written to a file whenever one is added.

    Args:
        file: JSON; figures already in it are not measured again.
        only: measure only figures whose key this pattern matches.
    """

    def __init__(self, file: Path, only: str) -> None:
        self.file = file
        self._only = re.compile(only)
        self.figures: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def lacks(self, key: str) -> bool:
        """Whether a figure is still to be measured."""
        return key not in self.figures and bool(self._only.search(key))

    def shown(self, key: str) -> str:
        """Return a figure for the tables; empty where it was not measured."""
        return f"{self.figures[key]:.2f}" if key in self.figures else ""

    def add(self, key: str, value: Any) -> None:
        """Add a figure and write the file."""
        self.figures[key] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.figures, indent=2) + "\n")
        print(f"{key}: {value}", flush=True)


def measure_merge(store: Store, name: str, suite: Suite, *, first: bool) -> None:
    """All figures of one merge that are not in the store yet.

    Only the first merge is measured with every sample count and seed.
    """

    def figure(key: str, variant: str, used: Suite) -> None:
        if store.lacks(f"{name}/{key}"):
            store.add(f"{name}/{key}", measure(used, variant)["average"])

    if f"{name}/fp32" not in store.figures:
        model = suite.family.load(suite.folder)
        store.add(f"{name}/fp32", suite.average(model))
        store.add(f"{name}/standard error", suite.standard_error(model))
    for method, variant in METHODS.items():
        for bits in BITS:
            if bits == BITS[0] or method in NARROW:
                figure(f"{method}/{bits}", f"{variant},bits={bits}", suite)
    figure(f"{OUTPUTS}/unrounded", "epmq,preset=outputs,rounding=false", suite)
    figure(f"{OUTPUTS}/float32", "epmq,preset=outputs,products=float32", suite)
    figure(f"{OUTPUTS}/distill", f"epmq,preset=outputs,distill={EPOCHS}", suite)
    if not first:
        return
    for bits in BITS:
        figure(f"{OUTPUTS}/{bits}/unrefined", f"epmq,preset=outputs,refine=0,bits={bits}", suite)
    figure(f"{OUTPUTS}/auto", "epmq,preset=outputs,anchor=auto", suite)
    for width in MIXED:
        figure(f"{OUTPUTS}/mixed {width}", f"epmq,preset=outputs,target_bits={width}", suite)
    runs = [(SEED_SAMPLES, seed) for seed in SEEDS] + [(samples, 0) for samples in SAMPLES]
    for samples, seed in dict.fromkeys(runs):
        missing = [
            method for method in FOLLOWED if store.lacks(f"{name}/{method}/4/{samples}x{seed}")
        ]
        used = recalibrated(suite, samples, seed) if missing else suite
        for method in missing:
            figure(f"{method}/4/{samples}x{seed}", METHODS[method], used)


def recalibrated(suite: Suite, samples: int, seed: int) -> Suite:
    """Return the suite with other calibration samples."""
    recipe = override(suite.recipe, "quantize", {"samples": samples, "seed": seed})
    return replace(suite, recipe=recipe)


def tables(store: Store, merges: list[str]) -> str:
    """Return the figures as Markdown."""
    shown = store.shown
    lines = [
        f"experts {shown('experts')}, base {shown('base')}",
        "",
        "| merge | fp32 merged | bits | " + " | ".join(METHODS) + " |",
        "|---|--:|--:|" + "--:|" * len(METHODS),
    ]
    for merge in merges:
        for bits in BITS if merge == merges[0] else BITS[:1]:
            row = [shown(f"{merge}/{method}/{bits}") for method in METHODS]
            lines.append(f"| {merge} | {shown(f'{merge}/fp32')} | {bits} | {' | '.join(row)} |")
    first = merges[0]
    lines += ["", f"standard error from test samples: {shown(f'{first}/standard error')}"]
    for merge in merges:
        unrounded, exact = (shown(f"{merge}/{OUTPUTS}/{what}") for what in ("unrounded", "float32"))
        lines += ["", f"{merge}: preset outputs without rounding {unrounded}"]
        lines += [f"(products of activations in float32: {exact})"]
        lines += [f"after {EPOCHS} epochs of distillation: {shown(f'{merge}/{OUTPUTS}/distill')}"]
    lines += ["", f"{first}: anchor auto {shown(f'{first}/{OUTPUTS}/auto')}"]
    for bits in BITS:
        lines += [f"{bits} bits, no refinement: {shown(f'{first}/{OUTPUTS}/{bits}/unrefined')}"]
    for width in MIXED:
        lines += [f"{width} bits on average: {shown(f'{first}/{OUTPUTS}/mixed {width}')}"]
    runs = [(SEED_SAMPLES, seed) for seed in SEEDS] + [(samples, 0) for samples in SAMPLES]
    columns = list(dict.fromkeys(runs))
    named = [f"{samples} samples, seed {seed}" for samples, seed in columns]
    named.append(f"{SEED_SAMPLES} samples, mean ± standard error over seeds")
    lines += ["", f"4 bits, {first}:", "", "| method | " + " | ".join(named) + " |"]
    lines += ["|---|" + "--:|" * len(named)]
    for method in FOLLOWED:
        row = [shown(f"{first}/{method}/4/{samples}x{seed}") for samples, seed in columns]
        row.append(over_seeds(store, f"{first}/{method}/4"))
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines)


def over_seeds(store: Store, start: str) -> str:
    """Return the mean over seeds and its standard error; empty while any is missing."""
    keys = [f"{start}/{SEED_SAMPLES}x{seed}" for seed in SEEDS]
    if not all(key in store.figures for key in keys):
        return ""
    values = [store.figures[key] for key in keys]
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--name", default="zoo")
    parser.add_argument("--merge", action="append", choices=list(MERGES), help="default: all")
    parser.add_argument("--only", default="", help="pattern of the figures to measure")
    parser.add_argument("--limit", type=int, help="test samples per task; all when absent")
    parser.add_argument("--set", action="append", default=[], metavar="section.option=value")
    arguments = parser.parse_args()
    store = Store(RESULTS / f"suite_{arguments.name}.json", arguments.only)
    merges = arguments.merge or list(MERGES)
    for index, name in enumerate(merges):
        settings = MERGES[name]
        recipe = assign(load_recipe(arguments.recipe), [*arguments.set, *settings])
        with tempfile.TemporaryDirectory() as work:
            merged = Path(work) / "merged"
            suite = load_suite(recipe, merged, held_back=False, limit=arguments.limit)
            if "experts" not in store.figures:
                store.add("experts", suite.experts_average())
                base = suite.family.load(Path(recipe.base.path))
                store.add("base", suite.average(base))
            measure_merge(store, name, suite, first=index == 0)
    print(tables(store, merges))


if __name__ == "__main__":
    main()
