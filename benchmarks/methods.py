"""Accuracy of quantization methods side by side, in torch, on one merge of a recipe's experts.

    python benchmarks/methods.py                       # the bundled zoo, test samples
    python benchmarks/methods.py --held-back           # choose options without test samples
    python benchmarks/methods.py --set merge.method=ties --variant epmq,bits=2,anchor=0.5
    python benchmarks/methods.py --held-back --recipe RECIPE.yaml --name text

With ``--held-back`` half of each task's calibration samples calibrates, drawn at random; the others
are scored, and values around the default's are measured too. Adds its run to
``benchmarks/results/methods.json``, or ``methods_held_back.json``, where those of other suites,
merges and sample counts stay, and prints the table as Markdown.
"""

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from scoring import model_score, standard_error, truth_of
from torch import Tensor, nn

import epmq_deploy
from epmq_deploy.cli.run import assign
from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import ModelFamily, TaskHead, family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.artifact import load_artifact, load_refitted_heads
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.sequential import apply_quantized, quantize_model
from epmq_deploy.quantization.stage import calibration_samples, quantize
from epmq_deploy.recipe import Recipe, load_recipe, override

ZOO = Path(epmq_deploy.__file__).parent / "zoo" / "recipe.yaml"
RESULTS = Path(__file__).parent / "results"
METHODS = (
    "rtn",
    "gptq",
    "gptaq",
    "epmq,preset=paper",
    "epmq,preset=features",
    "epmq,preset=outputs",
    "epmq,preset=weights",
    "epmq,effort=balanced",
)
VARIANTS = tuple(f"{method},bits={bits}" for bits in (4, 3) for method in METHODS)
# What the values of preset outputs were chosen among; never measured on test samples.
AROUND = tuple(
    f"epmq,preset=outputs,bits=4,{other}"
    for other in (
        "alpha=0.5",
        "alpha=0.75",
        "rho=1",
        "rho=2.2",
        "rho=4",
        "anchor=0.005",
        "anchor=0.05",
        "unpooled_weight=1",
    )
)


@dataclass(frozen=True)
class Suite:
    """One merge with what scores it, loaded once.

    Attributes:
        recipe: what was merged, and which samples calibrate.
        folder: the merged model.
        family: its family.
        scored: batches of inputs, and labels or values, by task.
        heads: by task.
    """

    recipe: Recipe
    folder: Path
    family: ModelFamily
    scored: dict[str, tuple[list[tuple[Tensor, ...]], Tensor]]
    heads: dict[str, TaskHead]

    def score(self, model: nn.Module, task: str, head: TaskHead | None = None) -> float:
        """Percent correct on a task's scored samples; of values, the rank correlation x 100."""
        inputs, truth = self.scored[task]
        return model_score(model, self.family, head or self.heads[task], inputs, truth)

    def average(self, model: nn.Module, heads: Mapping[str, TaskHead] | None = None) -> float:
        """Return the score averaged over tasks; ``heads`` stand in for tasks' usual ones."""
        heads = heads or {}
        scores = [self.score(model, task, heads.get(task)) for task in self.scored]
        return sum(scores) / len(scores)

    def standard_error(self, model: nn.Module) -> float:
        """Return the standard error of the average that the scored samples leave, in points."""
        errors = [
            standard_error(self.score(model, task), len(truth), values=truth.is_floating_point())
            for task, (_, truth) in self.scored.items()
        ]
        return float(sum(error**2 for error in errors) ** 0.5 / len(errors))

    def experts_average(self) -> float:
        """Each expert on its own task, averaged."""
        expert = ExpertBackbone(open_sources(self.recipe), torch.device("cpu"))
        scores = [self.score(expert.become(task), task) for task in self.scored]
        return sum(scores) / len(scores)


def load_suite(recipe: Recipe, folder: Path, held_back: bool, limit: int | None = None) -> Suite:
    """Merge into ``folder`` and load what is scored.

    Args:
        recipe: tasks and options.
        folder: for the merged model.
        held_back: score calibration samples, and leave half of them for calibration.
        limit: test samples per task at most.
    """
    merge(recipe, folder)
    family = family_of(folder)
    features = family.embedding_width(family.load(folder), folder)
    heads = build_heads(recipe.tasks, family, folder, features)
    if held_back:
        drawn = {"samples": recipe.quantize.samples // 2}  # type: ignore[attr-defined]
        recipe = override(recipe, "quantize", drawn)
        used = calibration_samples(recipe, family, folder)
    scored = {}
    for task, given in recipe.tasks.items():
        source = given.calibration if held_back else given.evaluation
        assert source is not None, f"task {task} has no data to score"
        samples = load_samples(task, source, family, limit=None if held_back else limit)
        if held_back:
            calibrating = set(used[task].indices)
            rest = [row for row in samples.indices if row not in calibrating]
            samples = replace(samples, indices=rest)
        truth = truth_of(recipe, samples, heads)
        scored[task] = list(batches(samples, family, folder, 64)), truth
    return Suite(recipe, folder, family, scored, heads)


def measure(suite: Suite, variant: str) -> dict[str, Any]:
    """Quantize one variant (``method,option=value,...``), as the product does, and score it.

    ``rounding=false`` scores the method's own weights, unrounded and without what effort adds.
    """
    name, *assignments = variant.split(",")
    flags = {key: yaml.safe_load(value) for key, value in (a.split("=") for a in assignments)}
    rounding = flags.pop("rounding", True)
    recipe = override(suite.recipe, "quantize", {"method": name, **flags})
    row = {"variant": variant, "options": recipe.quantize.model_dump(exclude_defaults=True)}
    started = time.perf_counter()
    if not rounding:
        average = suite.average(unrounded(suite, recipe))
        return {**row, "average": average, "seconds": time.perf_counter() - started}
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "quantized"
        details = quantize(recipe, suite.folder, output).details
        model = suite.family.load(suite.folder)
        apply_quantized(model, *load_artifact(output))
        heads = load_refitted_heads(output)
    return {
        **row,
        "chosen": details.options and details.options.model_dump(mode="json"),
        "distilled_weights": details.distill_weights
        and details.distill_weights.model_dump(mode="json"),
        "distilled": details.distill and details.distill.model_dump(mode="json"),
        "average": suite.average(model, heads),
        "seconds": time.perf_counter() - started,
    }


def unrounded(suite: Suite, recipe: Recipe) -> nn.Module:
    """Return the merged model with the weights that the method aims at."""
    experts = ExpertBackbone(open_sources(recipe), torch.device("cpu"))
    model = suite.family.load(suite.folder)
    calibration = {
        task: list(batches(samples, suite.family, suite.folder, 32))
        for task, samples in calibration_samples(recipe, suite.family, suite.folder).items()
    }
    quantize_model(
        model,
        suite.family,
        QUANTIZATION_METHODS[recipe.quantize.method],
        recipe.quantize,
        batches={task: (lambda inputs=inputs: inputs) for task, inputs in calibration.items()},
        experts=experts,
        rounding=False,
    )
    return model


def main() -> None:
    """Measure all variants and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ZOO)
    parser.add_argument("--name", default="zoo")
    parser.add_argument("--set", action="append", default=[], metavar="section.option=value")
    parser.add_argument("--variant", action="append", metavar="method,option=value,...")
    parser.add_argument("--held-back", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    held_back = arguments.held_back
    output = arguments.results / ("methods_held_back.json" if held_back else "methods.json")
    recipe = assign(load_recipe(arguments.recipe), arguments.set)
    with tempfile.TemporaryDirectory() as work:
        suite = load_suite(recipe, Path(work) / "merged", held_back)
        rows = [
            {"variant": "experts", "average": suite.experts_average()},
            {"variant": "fp32 merged", "average": suite.average(suite.family.load(suite.folder))},
        ]
        print("| model | average score |\n|---|---|")
        for row in rows:
            print(f"| {row['variant']} | {row['average']:.2f} |", flush=True)
        for variant in arguments.variant or VARIANTS + (AROUND if held_back else ()):
            rows.append(measure(suite, variant))
            print(f"| {variant} | {rows[-1]['average']:.2f} |", flush=True)
    known = json.loads(output.read_text()) if output.is_file() else {}
    place = f"{arguments.name}, {recipe.merge.method}, {recipe.quantize.samples} samples"
    known[place] = {
        "scored": "held-back calibration samples" if held_back else "test samples",
        "merge": recipe.merge.model_dump(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
