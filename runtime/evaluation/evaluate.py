"""Measure an export: every graph's accuracy on every task, its latency, memory and size."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from epmq_deploy.artifacts.manifest import ExportManifest, GraphEntry, fingerprint
from epmq_deploy.artifacts.outputs import open_output
from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.heads import head_classes, heads_of_experts, load_heads
from epmq_deploy.data.loading import data_sha256
from epmq_deploy.data.targets import imbalance, targets_of
from epmq_deploy.errors import MismatchError
from epmq_deploy.models import ModelFamily, TaskHead, family_of
from epmq_deploy.models.experts import ExpertBackbone, check_unchanged, open_sources
from epmq_deploy.models.input_sources import written_inputs
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.quantization.artifact import REPORT_FILE, load_reports
from epmq_deploy.recipe import EvalOptions, Recipe
from epmq_deploy.runtime.evaluation.bench import Bench
from epmq_deploy.runtime.evaluation.comparison import average_interval, compare
from epmq_deploy.runtime.evaluation.data import evaluation_samples
from epmq_deploy.runtime.evaluation.predictions import TaskPredictions, metrics_of, metrics_of_text
from epmq_deploy.runtime.evaluation.report import EXPERTS, REFERENCE, EvalReport, Gates, Row
from epmq_deploy.runtime.evaluation.scoring import ClassScorer, Scorer
from epmq_deploy.runtime.evaluation.text_scoring import TextScorer
from epmq_deploy.runtime.ort.sessions import by_format


def eval_fingerprint(recipe: Recipe, exported: str) -> str:
    """Return the fingerprint of evaluating that export; gates have no part in it."""
    inputs = {"export": exported}
    for name, task in recipe.tasks.items():
        if task.evaluation is not None:
            inputs[f"evaluation:{name}"] = data_sha256(task.evaluation, task.prompt)
        if task.metric is not None:
            inputs[f"metric:{name}"] = " ".join(task.metric)
    options = recipe.eval.model_dump(mode="json", exclude={item.name for item in fields(Gates)})
    return fingerprint("eval", options, inputs)


def gates_of(options: EvalOptions) -> Gates:
    """Return the gates among the options."""
    return Gates(options.max_drop, options.max_latency_ratio, options.max_size)


def measure(
    recipe: Recipe,
    exported: Path,
    *,
    provider: str | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Run every graph in ``exported`` in onnxruntime on every task's evaluation samples.

    Args:
        recipe: tasks and options.
        exported: folder of an export.
        provider: of onnxruntime, in place of the options'.
        device: where experts run in torch, each on its own task.
        progress: shows one step per task, and one per setting that is timed.

    Raises:
        RecipeError: ``exported`` is no export, or the provider is not there or not really used.
        MismatchError: no fp32 graph, or see `evaluation_samples`; all at once.
    """
    progress = progress or NoProgress()
    manifest = open_output(exported, "export")
    family = family_of(exported)
    heads = {} if generates_text(family) else load_heads(exported)
    inputs = written_inputs(recipe.tasks, exported)
    samples = evaluation_samples(recipe, family, exported, heads, inputs)
    classes = {
        task: head_classes(recipe.tasks[task], heads[task]) for task in samples if task in heads
    }
    targets = {task: targets_of(samples[task], head) for task, head in classes.items()}
    formats = by_format(manifest.graphs)
    if REFERENCE not in formats:
        raise MismatchError("evaluation", [f"{exported} has no {REFERENCE} graph to compare with"])
    options, asked = recipe.eval, provider or recipe.eval.provider
    experts = _experts(recipe, manifest, device or torch.device("cpu"))
    if experts is not None and heads:
        heads = heads_of_experts(recipe.tasks, experts.sources, heads, experts.device)
    scorer = _scorer(recipe, family, exported, manifest.graphs, asked, heads, classes, experts)
    bench = Bench(exported, formats, scorer, samples, options, asked, progress)
    models = scorer.open(bench.threads[0])
    predictions = {
        task: scorer.predict(models, task, chosen)
        for task, chosen in progress.track(samples.items(), "evaluating", total=len(samples))
    }
    used = models[REFERENCE].provider
    # Timed ones are opened anew, with as many threads as they are timed with.
    del models
    costs = bench.costs()
    names = ([EXPERTS] if experts else []) + list(costs)
    rows = (row_of(name, predictions, options.margin, **costs.get(name, {})) for name in names)
    return EvalReport(
        rows=tuple(rows),
        samples={task: len(chosen) for task, chosen in samples.items()},
        provider=used,
        gates=gates_of(options),
        margin=options.margin,
        fingerprint=eval_fingerprint(recipe, manifest.fingerprint),
        diagnoses=bench.diagnoses() if options.diagnose else {},
        metrics={
            task: predicted.score(REFERENCE).metric for task, predicted in predictions.items()
        },
        hub_metrics={
            task: predicted.score(REFERENCE).hub_name for task, predicted in predictions.items()
        },
        assumptions=tuple(said for target in targets.values() if (said := target.assumption)),
        imbalances=tuple(
            f"task {task!r}: {said}"
            for task, head in classes.items()
            if (said := imbalance(targets[task], head))
        ),
        class_names={
            task: head.names or tuple(map(str, range(head.count or 0)))
            for task, head in classes.items()
        },
        layers=tuple(load_reports(exported)) if (exported / REPORT_FILE).is_file() else (),
    )


def row_of(
    name: str, predictions: Mapping[str, TaskPredictions], margin: float, **costs: Any
) -> Row:
    """One model's accuracies, compared with fp32 merged unless it is that or the experts.

    Args:
        name: a model in every task's ``predictions``, beside ``fp32``.
        predictions: by task.
        margin: points that may be lost and still count as no worse.
        costs: the row's other attributes.
    """
    scores = {task: predicted.score(name) for task, predicted in predictions.items()}
    accuracy = {task: score.percent for task, score in scores.items()}
    intervals = {task: score.interval for task, score in scores.items()}
    costs["metrics"] = {task: found.percents(name) for task, found in predictions.items()}
    costs["recalls"] = {task: found.recalls(name) for task, found in predictions.items()}
    if name not in (EXPERTS, REFERENCE):
        reference = {task: predicted.score(REFERENCE) for task, predicted in predictions.items()}
        same = {task: predicted.same(name, REFERENCE) for task, predicted in predictions.items()}
        against, average = compare(scores, reference, same, margin)
        costs |= {"against": against, "against_average": average}
    return Row(name, accuracy, intervals, average_interval(scores), **costs)


def _scorer(
    recipe: Recipe,
    family: ModelFamily,
    exported: Path,
    graphs: Sequence[GraphEntry],
    provider: str,
    heads: Mapping[str, TaskHead],
    classes: Mapping[str, HeadClasses],
    experts: ExpertBackbone | None,
) -> Scorer[Any, Any]:
    """How models of this family are scored."""
    size = recipe.eval.batch_size
    if generates_text(family):
        longest = recipe.eval.max_tokens
        metrics = {task: metrics_of_text(options) for task, options in recipe.tasks.items()}
        return TextScorer(family, exported, graphs, provider, size, longest, experts, metrics)
    metrics = {task: metrics_of(recipe.tasks[task], head) for task, head in classes.items()}
    return ClassScorer(family, exported, graphs, provider, size, heads, classes, metrics, experts)


def _experts(
    recipe: Recipe, manifest: ExportManifest, device: torch.device
) -> ExpertBackbone | None:
    if not recipe.eval.experts:
        return None
    sources = open_sources(recipe)
    check_unchanged(sources, manifest)
    return ExpertBackbone(sources, device)
