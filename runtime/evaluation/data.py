"""The samples of an evaluation, checked before any work."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from epmq_deploy.data.heads import PLAIN, Reading, head_classes, head_of_expert
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.preflight import check_images
from epmq_deploy.data.samples import Samples, batches
from epmq_deploy.data.targets import targets_of
from epmq_deploy.errors import EpmqError, MismatchError, RecipeError, problems_of
from epmq_deploy.models import ModelFamily, TaskHead
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.recipe import Recipe, Task
from epmq_deploy.runtime.evaluation.predictions import check_pairs, metrics_of, metrics_of_text

log = logging.getLogger(__name__)


def evaluation_samples(
    recipe: Recipe,
    family: ModelFamily,
    folder: Path,
    heads: Mapping[str, TaskHead] | None = None,
    inputs: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, Samples]:
    """Return the evaluation samples of every task, loaded and checked.

    Images are decoded beforehand as the recipe's ``preflight`` says.

    Args:
        recipe: tasks and options.
        family: the model's family.
        folder: a model folder with preprocessor settings.
        heads: of the exported graphs; before there are any, what the recipe says of them counts.
        inputs: by task, the folder whose settings make its inputs where it is not ``folder``.

    Raises:
        MismatchError: names every task without data or head, or with labels its head lacks; also
            where layers are to be compared of a model whose graphs do not run by themselves.
    """
    samples, problems = {}, []
    if recipe.eval.diagnose and generates_text(family):
        problems.append("eval.diagnose compares layers of classifiers; leave it out")
    for name, task in recipe.tasks.items():
        if task.evaluation is None:
            problems.append(f"task {name!r} has no evaluation data (tasks.{name}.evaluation)")
            continue
        try:
            if generates_text(family):
                classes, reading = None, PLAIN
            else:
                head = _head(name, task, family, folder, heads)
                classes = head_classes(task, head)
                reading = Reading.of_head(head) if head else Reading.of_task(task, family)
            samples[name] = load_samples(
                name,
                task.evaluation,
                family,
                prompt=task.prompt,
                limit=recipe.eval.max_samples,
                reading=reading,
            )
            samples[name] = replace(samples[name], inputs_folder=inputs.get(name))
            if classes is not None:
                check_images(samples[name], recipe.preflight)
                next(batches(samples[name], family, folder, 1))
                check_pairs(samples[name], metrics_of(task, classes))
                assumption = targets_of(samples[name], classes).assumption
                # What is assumed when graphs are evaluated stands in the report.
                if assumption and heads is None:
                    log.info("%s", assumption)
            else:
                metrics_of_text(task)
        except EpmqError as error:
            problems += problems_of(error)
    if problems:
        raise MismatchError("evaluation", problems)
    return samples


def _head(
    name: str,
    task: Task,
    family: ModelFamily,
    folder: Path,
    heads: Mapping[str, TaskHead] | None,
) -> TaskHead | None:
    """Return a task's head; None where the recipe gives one that is not built yet.

    Raises:
        RecipeError: there is no head, or its expert's cannot be read.
    """
    try:
        head = head_of_expert(task, family, folder) if heads is None else heads.get(name)
    except EpmqError as error:
        raise RecipeError(f"task {name!r}: {error}") from error
    if head is None and (task.head is None or heads is not None):
        raise RecipeError(f"task {name!r} has no head (tasks.{name}.head)")
    return head
