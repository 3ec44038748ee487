"""The samples of an evaluation, checked before any work."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.recipe import Recipe
from epmq_deploy.tasks.data import Samples, batches, load_samples
from epmq_deploy.tasks.heads import head_of_expert


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
