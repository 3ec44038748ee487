"""Searching a merge method's scaling on calibration samples.

How far to go along the merged task vector depends on the experts, and the weights do not tell. What
counts is how well the merged model predicts, by one of three objectives:

- ``experts``: the Kullback-Leibler divergence from the predictions of each task's expert;
- ``labels``: the cross-entropy of the data's labels;
- ``entropy``: the entropy of the predictions, as AdaMerging minimises it (Yang et al., arXiv
  2310.02575).
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from epmq_deploy.data.agreement import Judge, Scores, Tuned, mean_divergence, scored, tune
from epmq_deploy.errors import EpmqError, MismatchError
from epmq_deploy.merging.base import Merger
from epmq_deploy.merging.data import RecipeData
from epmq_deploy.merging.task_vectors import CheckpointTaskVectors
from epmq_deploy.models.predictions import PredictedLogits
from epmq_deploy.models.problem_types import WITHOUT_CLASSES, entropy, negative_log_likelihood
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.options.merging import ScaledOptions

log = logging.getLogger(__name__)

_FACTOR, _STEPS = 1.5, 4


def check_objective(data: RecipeData, options: ScaledOptions) -> None:
    """Make sure that the data have what the objective needs.

    Raises:
        MismatchError: names every task without labels, or whose predictions have no entropy; or a
            model that does not predict classes.
    """
    if options.search_objective == "entropy":
        problems = [
            f"task {task!r} has a head for {head.problem_type}, whose predictions have none"
            for task, head in data.heads.items()
            if head.problem_type in WITHOUT_CLASSES
        ]
        if problems:
            raise MismatchError("merge.search_objective: entropy", problems)
    if options.search_objective != "labels":
        return
    subject = "merge.search_objective: labels"
    if generates_text(data.family):
        raise MismatchError(
            subject, ["text-generation models support only the objectives experts and entropy"]
        )
    problems = []
    for task in data.samples:
        try:
            data.targets(task)
        except EpmqError as error:
            problems.append(str(error))
    if problems:
        raise MismatchError(subject, problems)


def search_scaling(
    data: RecipeData,
    merger: Merger[Any, Any],
    options: ScaledOptions,
    vectors: CheckpointTaskVectors,
) -> Tuned:
    """Find the scaling whose merge predicts best, by the objective of the options.

    The result of the method is linear in its scaling, so it is merged once; two models and the
    merged task vector are in memory. Merging itself uses no samples, so all are new to it.

    Args:
        data: samples and experts.
        merger: the method with its statistics.
        options: of the method, with the scaling to start from.
        vectors: the experts' task vectors.
    """
    base = data.sources.base
    loss = _loss(data, options)
    names = data.progress.track(list(vectors.names), "merging to search")
    fixed, direction = _fixed_and_direction(merger, options, vectors, names)
    model = data.backbone()
    # Merged tensors that are not parameters of the model do not change its predictions.
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for name in fixed.keys() & parameters.keys():
        parameters[name].copy_(fixed[name])

    def score(scaling: float) -> Scores:
        for name in direction.keys() & parameters.keys():
            base.load_into(name, parameters[name])
            parameters[name].add_(direction[name], alpha=scaling)
        scores = loss(model)
        log.info(
            "scaling %.4g: loss by %s %.4f",
            scaling,
            options.search_objective,
            mean_divergence(scores),
        )
        return scores

    return tune(score, options.scaling, factor=_FACTOR, steps=_STEPS, finer=True)


def _fixed_and_direction(
    merger: Merger[Any, Any],
    options: ScaledOptions,
    vectors: CheckpointTaskVectors,
    names: Iterable[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merge tensors whose scaling is set by name; return what scaling 1 adds to all others."""
    fixed, direction = {}, {}
    unit, none = options.at(1.0), options.at(0.0)
    merger_at_one = replace(merger, options=unit)
    for name in names:
        base, task_vectors = vectors.with_base(name)
        merged = merger_at_one.merge(name, base, task_vectors)
        if unit.for_tensor(name).scaling != none.for_tensor(name).scaling:
            direction[name] = merged - base
        else:
            fixed[name] = merged
    return fixed, direction


def _loss(data: RecipeData, options: ScaledOptions) -> Callable[[nn.Module], Scores]:
    """Return a function from a merged model to its loss on every sample."""
    folder, heads = data.sources.base.folder, data.heads
    if options.search_objective == "experts":
        return Judge.of_experts(
            data.family, folder, data.samples, heads, data.experts.become, heads
        ).scores
    labels = {}
    if options.search_objective == "labels":
        labels = {task: data.targets(task) for task in data.samples}

    def loss(task: str, predicted: PredictedLogits) -> Tensor:
        if task in labels:
            return negative_log_likelihood(predicted.logits, labels[task], predicted.problem_type)
        return entropy(predicted.logits, predicted.problem_type)

    return lambda model: scored(model, data.family, folder, data.samples, heads, loss)
