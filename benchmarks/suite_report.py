"""Scores of a suite's experts and of fp32 merges of them, per task."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from scoring import model_score, truth_of

from epmq_deploy.cli.run import assign
from epmq_deploy.data.heads import build_heads
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.samples import batches
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.recipe import Recipe

SCALING = 0.3
MERGES = {
    "Task Arithmetic 0.3": ["merge.method=task_arithmetic", f"merge.scaling={SCALING}"],
    "TIES 0.3": ["merge.method=ties", f"merge.scaling={SCALING}"],
    "average": ["merge.method=average"],
}


def report(recipe: Recipe, output: Path, known: Mapping[str, Mapping[str, float]]) -> None:
    """Write test scores of experts and merges as JSON, and print them as Markdown.

    Args:
        recipe: the suite's.
        output: the JSON file.
        known: rows that were measured before, by name.
    """
    rows = {name: dict(scores) for name, scores in known.items()}
    with tempfile.TemporaryDirectory() as work:
        for number, (name, flags) in enumerate(MERGES.items()):
            chosen = assign(recipe, flags)
            merged = Path(work) / str(number)
            merge(chosen, merged)
            rows |= scores_of(chosen, merged, name, experts=number == 0)
    print(f"| | {' | '.join(recipe.tasks)} | average |\n|---|{'--:|' * (len(recipe.tasks) + 1)}")
    for name, scores in rows.items():
        values = [*scores.values(), sum(scores.values()) / len(scores)]
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")


def scores_of(
    recipe: Recipe, merged: Path, name: str, *, experts: bool
) -> dict[str, dict[str, float]]:
    """Return scores by model and task: the merged model as ``name``, and the experts."""
    family = family_of(merged)
    model = family.load(merged)
    heads = build_heads(recipe.tasks, family, merged, family.embedding_width(model, merged))
    guide = ExpertBackbone(open_sources(recipe), torch.device("cpu")) if experts else None
    scores: dict[str, dict[str, float]] = {"experts": {}, name: {}} if experts else {name: {}}
    for task, options in recipe.tasks.items():
        assert options.evaluation is not None, "recipe_of gives every task evaluation data"
        samples = load_samples(task, options.evaluation, family)
        inputs = list(batches(samples, family, merged, 64))
        truth = truth_of(recipe, samples, heads)
        scores[name][task] = model_score(model, family, heads[task], inputs, truth)
        if guide is not None:
            expert = guide.become(task)
            scores["experts"][task] = model_score(expert, family, heads[task], inputs, truth)
    return scores
