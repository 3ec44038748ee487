"""Model cards: the ``README.md`` of a stage's folder, as the Hugging Face hub reads it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from epmq_deploy.artifacts.manifest import AnyManifest, MergeManifest
from epmq_deploy.artifacts.names import CARD
from epmq_deploy.checkpoints.hub import hub_id
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError
from epmq_deploy.recipe import DataSource, Recipe
from epmq_deploy.registry import MERGE_METHODS

_LIBRARIES = {"merge": "transformers", "quantize": "epmq-deploy", "export": "onnx"}
_RELATIONS = {"merge": "merge", "quantize": "quantized", "export": "quantized"}
_SECTIONS = {
    "merge": ("merge",),
    "quantize": ("merge", "quantize"),
    "export": ("merge", "quantize", "export"),
}
_KINDS = {
    "merge": "One model",
    "quantize": "One model, quantized to integer codes,",
    "export": "One model, quantized and exported to ONNX,",
}


@dataclass(frozen=True)
class Evaluation:
    """What a model card shows of an evaluation.

    Attributes:
        text: Markdown to show.
        kind: of the tasks, as the hub names it (``image-classification``).
        scores: percent by graph's name and task.
        metrics: by task, the metric as the hub names it (``spearmanr``); accuracy where none is
            given.
        kinds: of tasks of another kind, by name.
    """

    text: str
    kind: str
    scores: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, str]
    kinds: Mapping[str, str] = field(default_factory=dict)


def model_card(
    manifest: AnyManifest, license_name: str | None = None, evaluation: Evaluation | None = None
) -> str:
    """Return the card of a stage's folder.

    Local folders are called by their last name only; what the hub can link to is in the metadata.

    Args:
        manifest: of the folder.
        license_name: the base's license, as the hub spells it, where it is known.
        evaluation: of the folder's graphs.

    Returns:
        YAML metadata between lines of dashes, then Markdown; the same for the same arguments.
    """
    recipe = manifest.recipe
    parts = [
        f"# {len(recipe.tasks)} experts of {_shown(recipe.base.path)} in one model",
        f"{_KINDS[manifest.stage]} made from {len(recipe.tasks)} fine-tuned experts of "
        f"`{_shown(recipe.base.path)}` with epmq-deploy.",
        _tasks_table(recipe),
        f"## How it was made\n\nMerged by {_method(recipe)}.\n\n{_options(manifest)}",
    ]
    if evaluation:
        parts.append(f"## Evaluation\n\n{evaluation.text.strip()}")
    elif manifest.stage == "export":
        parts.append("## Evaluation\n\nNot evaluated yet; `epmq eval` fills this in.")
    return (
        f"---\n{_metadata(manifest, license_name, evaluation)}---\n\n" + "\n\n".join(parts) + "\n"
    )


def write_card(folder: Path, manifest: AnyManifest, evaluation: Evaluation | None = None) -> None:
    """Write a stage's ``README.md``, or write it anew with an evaluation.

    Args:
        folder: of the stage.
        manifest: of the folder.
        evaluation: of its graphs.
    """
    text = model_card(manifest, license_of(manifest.recipe.base.path), evaluation)
    (folder / CARD).write_text(text, encoding="utf-8")


def license_of(path_or_id: str) -> str | None:
    """Return the license that a model's card or config names; None where they name none.

    Args:
        path_or_id: folder, file in it, or hub id; nothing is fetched.
    """
    given = Path(path_or_id)
    file = (given.parent if given.is_file() else given) / CARD
    on_hub = hub_id(path_or_id)
    if on_hub is not None:
        cached = try_to_load_from_cache(on_hub.repository, CARD, revision=on_hub.revision)
        file = Path(cached) if isinstance(cached, str) else file
    found: Any = None
    if file.is_file():
        try:
            found = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
            found = found.data.license
        except (ValueError, yaml.YAMLError):
            found = None
    if found is None and file.parent.is_dir():
        try:
            found = (ModelFolder.at(file.parent).config or {}).get("license")
        except RecipeError:
            found = None
    return found if isinstance(found, str) else None


def _metadata(
    manifest: AnyManifest, license_name: str | None, evaluation: Evaluation | None
) -> str:
    recipe, stage = manifest.recipe, manifest.stage
    models = [recipe.base.path, *(task.expert for task in recipe.tasks.values())]
    sources = [
        source.path
        for task in recipe.tasks.values()
        for source in (task.calibration, task.evaluation)
        if source is not None
    ]
    linked, datasets = _repositories(models), _repositories(sources)
    tags = ["merge", "model-merging", recipe.merge.method]
    if stage != "merge":
        tags += ["quantized", f"{recipe.quantize.bits}-bit"]
    if stage == "export":
        tags.append("onnx")
    data = ModelCardData(
        base_model=linked or None,
        datasets=datasets or None,
        library_name=_LIBRARIES[stage],
        license=license_name,
        tags=tags,
        **({"base_model_relation": _RELATIONS[stage]} if linked else {}),
    )
    if evaluation is not None:
        data.model_name = f"{_shown(recipe.base.path)}, {len(recipe.tasks)} experts merged"
        data.eval_results = _results(recipe, evaluation)
    return f"{data.to_yaml()}\n"


def _repositories(paths: Iterable[str]) -> list[str]:
    """Those on the hub, once each."""
    found = (hub_id(path) for path in paths)
    return list(dict.fromkeys(item.repository for item in found if item is not None))


def _results(recipe: Recipe, evaluation: Evaluation) -> list[EvalResult]:
    """Every graph's score on every task, as the hub lists them."""
    results = []
    for graph, scores in evaluation.scores.items():
        for task, score in scores.items():
            source = recipe.tasks[task].evaluation
            results.append(
                EvalResult(
                    task_type=evaluation.kinds.get(task, evaluation.kind),
                    dataset_type=task if source is None else _shown(source.path),
                    dataset_name=task,
                    dataset_split=None if source is None else source.split,
                    metric_type=evaluation.metrics.get(task, "accuracy"),
                    metric_name=graph,
                    metric_value=round(score, 2),
                )
            )
    return results


def _tasks_table(recipe: Recipe) -> str:
    lines = ["| task | expert | calibration data | evaluation data |", "|---|---|---|---|"]
    lines += [
        f"| {name} | `{_shown(task.expert)}` | {_source(task.calibration)} "
        f"| {_source(task.evaluation)} |"
        for name, task in recipe.tasks.items()
    ]
    return "\n".join(lines)


def _source(source: DataSource | None) -> str:
    if source is None:
        return "none"
    split = f" ({source.split})" if source.split else ""
    return f"`{_shown(source.path)}`{split}"


def _method(recipe: Recipe) -> str:
    method = MERGE_METHODS[recipe.merge.method]
    return f"`{method.name}` ({method.source}): {method.summary}"


def _options(manifest: AnyManifest) -> str:
    content: dict[str, Mapping[str, Any]] = manifest.recipe.model_dump(mode="json")
    options = {section: dict(content[section]) for section in _SECTIONS[manifest.stage]}
    merge = manifest.details if isinstance(manifest, MergeManifest) else manifest.details.merge
    if merge.scaling is not None:
        # The scaling that a search found, in place of the one it started from.
        options["merge"]["scaling"] = merge.scaling
    return f"```yaml\n{yaml.safe_dump(options, sort_keys=False, allow_unicode=True)}```"


def _shown(path: str) -> str:
    """Return a hub id as it is, a local path by its last name: all that others can use."""
    return path if hub_id(path) else Path(path).name
