"""The eval stage: accuracy of every exported graph on every task, and the experts'."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.device import DeviceName
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.experts import ExpertBackbone, check_unchanged, open_sources
from epmq_deploy.models import ModelFamily, TaskHead, family_of
from epmq_deploy.models.writer import WriterFamily
from epmq_deploy.progress import NoProgress, Progress
from epmq_deploy.recipe import Recipe
from epmq_deploy.runtime.latency import Runs, measure_latency
from epmq_deploy.runtime.report import EXPERTS, EvalReport, Row
from epmq_deploy.runtime.sessions import Graph
from epmq_deploy.runtime.text_scoring import TextScorer, open_writers
from epmq_deploy.stage import Manifest, fingerprint, open_output
from epmq_deploy.tasks.accuracy import count_hits, embeddings
from epmq_deploy.tasks.data import Samples, batches, data_sha256, load_samples
from epmq_deploy.tasks.heads import head_of_expert, load_heads


def eval_fingerprint(recipe: Recipe, exported: str) -> str:
    """What decides an evaluation of an export of that fingerprint; the gate is no part of it."""
    inputs = {"export": exported}
    for name, task in recipe.tasks.items():
        if task.evaluation is not None:
            inputs[f"evaluation:{name}"] = data_sha256(task.evaluation, task.prompt)
    return fingerprint("eval", recipe.eval.model_dump(mode="json", exclude={"max_drop"}), inputs)


def evaluate(
    recipe: Recipe,
    exported: Path,
    *,
    provider: DeviceName = "auto",
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Run every graph in ``exported`` in onnxruntime on every task's evaluation samples.

    Experts run in torch, each on its own task.

    Raises:
        RecipeError: ``exported`` is no export, or the provider is not there.
        MismatchError: tasks without data or head, or labels beyond it; all at once.
    """
    progress = progress or NoProgress()
    made = open_output(exported, "export")
    family = family_of(exported)
    heads = {} if family.writes_texts else load_heads(exported)
    samples = evaluation_samples(recipe, family, exported, heads)
    files = made.details["graphs"]
    experts = _experts(recipe, made, device or torch.device("cpu"))
    scorer: _Scorer | TextScorer
    graphs: dict[str, Runs] = {}
    how: dict[str, Any] = {"provider": provider, "threads": recipe.eval.threads}
    size = recipe.eval.batch_size
    if isinstance(family, WriterFamily):
        longest = recipe.eval.max_tokens
        writers = open_writers(family, exported, files, longest, **how)
        graphs.update(writers)
        scorer = TextScorer(family, exported, size, longest, writers, experts)
    else:
        opened = {
            item["format"]: Graph(
                exported / item["file"], session_config=item["session_config"], **how
            )
            for item in files
        }
        graphs.update(opened)
        scorer = _Scorer(family, exported, size, opened, heads, experts)
    scores = {
        task: scorer.accuracies(task, chosen)
        for task, chosen in progress.track(samples.items(), "evaluating", total=len(samples))
    }
    one = next(scorer.batches(next(iter(samples.values())), 1))
    latency = measure_latency(graphs, one, recipe.eval.latency_runs)
    sizes: dict[str, int] = {}
    for item in files:
        sizes[item["format"]] = sizes.get(item["format"], 0) + item["bytes"]
    rows = (
        Row(
            name,
            {task: score[name] for task, score in scores.items()},
            sizes.get(name),
            latency.get(name),
        )
        for name in ([EXPERTS] if experts else []) + list(graphs)
    )
    return EvalReport(
        rows=tuple(rows),
        samples={task: len(chosen) for task, chosen in samples.items()},
        provider=next(iter(graphs.values())).provider,
        threads=recipe.eval.threads,
        fingerprint=eval_fingerprint(recipe, made.fingerprint),
    )


def _experts(recipe: Recipe, made: Manifest, device: torch.device) -> ExpertBackbone | None:
    if not recipe.eval.experts:
        return None
    sources = open_sources(recipe)
    check_unchanged(sources, made)
    return ExpertBackbone(sources, device)


def evaluation_samples(
    recipe: Recipe, family: ModelFamily, folder: Path, heads: Mapping[str, TaskHead] | None = None
) -> dict[str, Samples]:
    """The evaluation samples of every task, loaded and checked; one of each is decoded.

    Args:
        recipe: tasks and options.
        family: the model's family.
        folder: a model folder with preprocessor settings.
        heads: of the exported graphs; before there are any, what the recipe says of them counts.

    Raises:
        MismatchError: names every task without data or head, or with labels its head lacks.
    """
    samples, problems = {}, []
    for name, task in recipe.tasks.items():
        if task.evaluation is None:
            problems.append(f"task {name!r} has no evaluation data (tasks.{name}.evaluation)")
            continue
        if family.writes_texts:
            try:
                samples[name] = load_samples(
                    name,
                    task.evaluation,
                    family,
                    prompt=task.prompt,
                    limit=recipe.eval.max_samples,
                )
            except EpmqError as error:
                problems.append(str(error))
            continue
        names = task.head.classes if task.head is not None else None
        count = len(names) if names is not None else None
        try:
            head = head_of_expert(task, family, folder) if heads is None else heads.get(name)
        except EpmqError as error:
            problems.append(f"task {name!r}: {error}")
            continue
        if head is None and (task.head is None or heads is not None):
            problems.append(f"task {name!r} has no head (tasks.{name}.head)")
            continue
        if head is not None:
            count = head.classes
        try:
            samples[name] = load_samples(
                name,
                task.evaluation,
                family,
                prompt=task.prompt,
                limit=recipe.eval.max_samples,
            )
            next(batches(samples[name], family, folder, 1))
            problems += _label_problems(samples[name], count, names)
        except EpmqError as error:
            problems.append(str(error))
    if problems:
        raise MismatchError("evaluation", problems)
    return samples


def _label_problems(samples: Samples, count: int | None, names: Sequence[str] | None) -> list[str]:
    """Labels beyond the head, or class names in another order than the data's."""
    where = f"task {samples.task!r}: {samples.source.path}"
    labels = samples.labels()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (count is not None and high >= count):
        return [f"{where} has labels {low} to {high}, but its head has {count} classes"]
    stored = samples.class_names
    if names is None or stored is None:
        return []
    ours, theirs = [_plain(name) for name in names], [_plain(name) for name in stored]
    if ours != theirs and sorted(ours) == sorted(theirs):
        return [
            f"{where} numbers its classes {', '.join(stored)}; put tasks.{samples.task}.head."
            "classes in that order"
        ]
    return []


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").strip()


@dataclass(frozen=True)
class _Scorer:
    """Scores all models on a task, decoding each sample once."""

    family: ModelFamily
    folder: Path
    batch_size: int
    graphs: Mapping[str, Graph]
    heads: Mapping[str, TaskHead]
    experts: ExpertBackbone | None

    def batches(self, samples: Samples, size: int) -> Iterator[tuple[Tensor, ...]]:
        return batches(samples, self.family, self.folder, size)

    def accuracies(self, task: str, samples: Samples) -> dict[str, float]:
        """Percent correct by model name."""
        expert = self.experts.become(task) if self.experts else None
        labels = samples.labels()
        hits = dict.fromkeys([*self.graphs, *([EXPERTS] if expert else [])], 0)
        start = 0
        for batch in self.batches(samples, self.batch_size):
            truth = labels[start : start + len(batch[0])]
            start += len(truth)
            output = f"logits_{task}"
            for name, graph in self.graphs.items():
                logits = torch.from_numpy(graph.run(batch, [output])[output])
                hits[name] += count_hits(logits, truth)
            if self.experts is not None and expert is not None:
                logits = self.heads[task](embeddings(expert, self.family, batch))
                hits[EXPERTS] += count_hits(logits, truth)
        return {name: 100.0 * count / len(labels) for name, count in hits.items()}
