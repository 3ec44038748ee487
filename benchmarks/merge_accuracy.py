"""Accuracy of merge methods side by side, in float32 and in torch.

    python benchmarks/merge_accuracy.py                       # the bundled zoo, test samples
    python benchmarks/merge_accuracy.py --held-back           # compare options without test samples
    python benchmarks/merge_accuracy.py --method regmean --method fisher,labels=0

With ``--held-back`` methods that need data take the first half of each task's calibration samples,
and the other half is scored. Adds to ``benchmarks/results/merge_accuracy.json``, where other
methods' rows stay, and prints the table as Markdown.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from scoring import model_score, truth_of
from torch import Tensor

import epmq_deploy
from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import ModelFamily, family_of
from epmq_deploy.options.merging import DataOptions
from epmq_deploy.recipe import Recipe, load_recipe, override

ZOO = Path(epmq_deploy.__file__).parent / "zoo" / "recipe.yaml"
RESULTS = Path(__file__).parent / "results" / "merge_accuracy.json"
Scored = dict[str, tuple[list[tuple[Tensor, ...]], Tensor]]


def scored_samples(recipe: Recipe, family: ModelFamily, base: Path, held: int | None) -> Scored:
    """Return inputs and truth by task: of test samples, or calibration samples after ``held``."""
    heads = build_heads(recipe.tasks, family, base, family.embedding_width(family.load(base), base))
    scored = {}
    for task, given in recipe.tasks.items():
        source = given.evaluation if held is None else given.calibration
        assert source is not None, f"task {task} has no data to score"
        samples = load_samples(task, source, family, limit=None if held is None else 2 * held)
        if held is not None:
            samples = replace(samples, indices=samples.indices[held:])
        scored[task] = (
            list(batches(samples, family, base, 64)),
            truth_of(recipe, samples, heads),
        )
    return scored


def measure(recipe: Recipe, scored: Scored, variant: str, held: int | None) -> dict[str, Any]:
    """Merge by one variant (``method,option=value,...``) and score it."""
    method, *assignments = variant.split(",")
    flags = {key: yaml.safe_load(value) for key, value in (a.split("=") for a in assignments)}
    if held is not None and issubclass(MERGE_METHODS[method].options, DataOptions):
        flags["samples"] = held
    chosen = override(recipe, "merge", {"method": method, **flags})
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "merged"
        started = time.perf_counter()
        manifest = merge(chosen, folder)
        seconds = time.perf_counter() - started
        family = family_of(folder)
        model = family.load(folder)
        heads = build_heads(chosen.tasks, family, folder, family.embedding_width(model, folder))
        accuracies = {
            task: round(model_score(model, family, heads[task], inputs, truth), 2)
            for task, (inputs, truth) in scored.items()
        }
    return {
        "average": round(sum(accuracies.values()) / len(accuracies), 2),
        "seconds": round(seconds, 2),
        "tasks": accuracies,
        "options": chosen.merge.model_dump(mode="json"),
        "details": manifest.reported,
    }


def main() -> None:
    """Measure all variants and add them to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--method", action="append", metavar="method,option=value,...")
    parser.add_argument("--held-back", action="store_true")
    parser.add_argument("--half", type=int, default=128, help="samples held back per task")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    base = Path(recipe.base.path)
    held = arguments.half if arguments.held_back else None
    scored = scored_samples(recipe, family_of(base), base, held)
    known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    rows = known.setdefault("held-back calibration samples" if held else "test samples", {})
    # SLERP takes two experts.
    variants = arguments.method or [name for name in MERGE_METHODS if name != "slerp"]
    print("| merge | average score | seconds |\n|---|--:|--:|")
    for variant in variants:
        rows[variant] = measure(recipe, scored, variant, held)
        print(
            f"| {variant} | {rows[variant]['average']} | {rows[variant]['seconds']} |", flush=True
        )
        # After every row, so that an interrupted run keeps those before.
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
