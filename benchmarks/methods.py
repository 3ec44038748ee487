"""Accuracy of quantization methods side by side, in torch, on one merge of a recipe's experts.

    python benchmarks/methods.py                       # the bundled zoo, test samples
    python benchmarks/methods.py --held-back           # choose options without test samples
    python benchmarks/methods.py --set merge.method=ties --variant epmq,bits=2,anchor=0.5
    python benchmarks/methods.py --held-back --recipe RECIPE.yaml --name text

With ``--held-back`` each task's calibration samples are halved: one half calibrates, the other is
scored, and values around the default's are measured too. Adds its run to
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
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import ModelFamily, TaskHead, family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.distillation import distill
from epmq_deploy.quantization.methods import QUANTIZATION_METHODS
from epmq_deploy.quantization.planning import plan_anchor, plan_bits, with_bits
from epmq_deploy.quantization.sequential import quantize_model
from epmq_deploy.quantization.stage import calibration_samples
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
    """One merge with its data, loaded once.

    Attributes:
        recipe: what was merged.
        folder: the merged model.
        family: its family.
        samples: calibration samples by task.
        calibration: batches of inputs of them.
        scored: batches of inputs, and labels or values, by task.
        heads: by task.
    """

    recipe: Recipe
    folder: Path
    family: ModelFamily
    samples: dict[str, Samples]
    calibration: dict[str, list[tuple[Tensor, ...]]]
    scored: dict[str, tuple[list[tuple[Tensor, ...]], Tensor]]
    heads: dict[str, TaskHead]

    def score(self, model: nn.Module, task: str) -> float:
        """Percent correct on a task's scored samples; of values, the rank correlation x 100."""
        inputs, truth = self.scored[task]
        return model_score(model, self.family, self.heads[task], inputs, truth)

    def average(self, model: nn.Module) -> float:
        """Return the score averaged over tasks."""
        return sum(self.score(model, task) for task in self.scored) / len(self.scored)

    def standard_error(self, model: nn.Module) -> float:
        """Return the standard error of the average that the scored samples leave, in points."""
        errors = [
            standard_error(self.score(model, task), len(truth), values=truth.is_floating_point())
            for task, (_, truth) in self.scored.items()
        ]
        return float(sum(error**2 for error in errors) ** 0.5 / len(errors))

    def with_calibration(self, recipe: Recipe) -> "Suite":
        """Return the suite with the calibration samples another recipe asks for."""
        chosen = calibration_samples(recipe, self.family, self.folder)
        loaded = {
            task: list(batches(samples, self.family, self.folder, 32))
            for task, samples in chosen.items()
        }
        return replace(self, recipe=recipe, samples=chosen, calibration=loaded)

    def experts_average(self) -> float:
        """Each expert on its own task, averaged."""
        expert = ExpertBackbone(open_sources(self.recipe), torch.device("cpu"))
        scores = [self.score(expert.become(task), task) for task in self.scored]
        return sum(scores) / len(scores)


def load_suite(recipe: Recipe, folder: Path, held_back: bool, limit: int | None = None) -> Suite:
    """Merge into ``folder`` and load all samples; of test samples at most ``limit`` per task."""
    merge(recipe, folder)
    family = family_of(folder)
    features = family.embedding_width(family.load(folder), folder)
    heads = build_heads(recipe.tasks, family, folder, features)
    calibration, scored = {}, {}
    used = calibration_samples(recipe, family, folder)
    for task, chosen in used.items():
        inputs = list(batches(chosen, family, folder, 32))
        if held_back:
            half = len(inputs) // 2
            used[task] = replace(chosen, indices=chosen.indices[: half * 32])
            calibration[task] = inputs[:half]
            scored[task] = inputs[half:], truth_of(recipe, chosen, heads)[half * 32 :]
            continue
        calibration[task] = inputs
        source = recipe.tasks[task].evaluation
        assert source is not None, f"task {task} has no evaluation data"
        test = load_samples(task, source, family, limit=limit)
        scored[task] = list(batches(test, family, folder, 64)), truth_of(recipe, test, heads)
    return Suite(recipe, folder, family, used, calibration, scored, heads)


def measure(suite: Suite, variant: str) -> dict[str, Any]:
    """Quantize one variant (``method,option=value,...``) and score it.

    ``rounding=false`` scores the method's own weights, unrounded.
    """
    name, *assignments = variant.split(",")
    flags = {key: yaml.safe_load(value) for key, value in (a.split("=") for a in assignments)}
    rounding = flags.pop("rounding", True)
    recipe = override(suite.recipe, "quantize", {"method": name, **flags})
    options = recipe.quantize
    experts = ExpertBackbone(open_sources(recipe), torch.device("cpu"))
    ctx = CalibrationContext(
        suite.family,
        suite.folder,
        suite.samples,
        lambda: experts,
        torch.device("cpu"),
        heads=suite.heads,
    )
    method = QUANTIZATION_METHODS[options.method]
    if search := method.anchor_search(options):
        options = search.options_with(plan_anchor(search, ctx).anchor)
    if options.target_bits or options.target_size:
        options = with_bits(options, plan_bits(options, ctx).layers)
    model = suite.family.load(suite.folder)
    started = time.perf_counter()
    quantized = quantize_model(
        model,
        suite.family,
        method,
        options,
        batches={
            task: (lambda inputs=inputs: inputs) for task, inputs in suite.calibration.items()
        },
        experts=experts,
        rounding=rounding,
    )
    distilled = None
    if epochs := method.distillation_epochs(options):
        products = method.products_dtype(options)
        _, distilled = distill(model, quantized, ctx, epochs, products)
    return {
        "variant": variant,
        "distilled": distilled,
        "options": options.model_dump(exclude_defaults=True),
        "average": suite.average(model),
        "seconds": time.perf_counter() - started,
    }


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
