"""Tuning a merge method's scaling on calibration samples.

How far to go along the merged task vector depends on the experts, and nothing in the weights says
so. What counts here is how closely the merged model predicts, on each task's samples and through
its head, what that task's expert predicts. Labels are not needed and merging uses no samples, so
none of them is fitted.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from epmq_deploy.experts import Sources
from epmq_deploy.merging.checkpoint_vectors import CheckpointTaskVectors
from epmq_deploy.merging.method import Context, MergeMethod, ScaledOptions
from epmq_deploy.merging.recipe_data import load_data
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import Recipe
from epmq_deploy.tasks.agreement import Judge, Scores, Tuned, mean_divergence, tune

log = logging.getLogger(__name__)

_FACTOR, _STEPS = 1.5, 4


def search_scaling(
    recipe: Recipe,
    sources: Sources,
    method: MergeMethod[Any],
    vectors: CheckpointTaskVectors,
    statistics: Any,
    progress: Progress,
) -> Tuned:
    """Find the scaling whose merge predicts most closely what the experts predict.

    The method's result is linear in its scaling, so it is merged once; two models and the merged
    task vector are in memory.

    Args:
        recipe: tasks and options.
        sources: base and experts.
        method: with options that have a scaling.
        vectors: the experts' task vectors.
        statistics: what the method's global pass found.
        progress: shows the merge.

    Raises:
        MismatchError: calibration data or heads are missing or cannot be used; all at once.
    """
    options = recipe.merge
    assert isinstance(options, ScaledOptions), "only those can ask for a search"
    judge = _judge(recipe, sources, options, vectors.device, progress)
    names = progress.track(list(vectors.names), "merging to search")
    fixed, direction = _line(method, vectors, options, statistics, names)
    model = sources.family.load(sources.base.folder).to(vectors.device)
    # Merged tensors that the model does not hold have no part in what it predicts.
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for name in fixed.keys() & parameters.keys():
        parameters[name].copy_(fixed[name])

    def score(scaling: float) -> Scores:
        for name in direction.keys() & parameters.keys():
            sources.base.load_into(name, parameters[name])
            parameters[name].add_(direction[name], alpha=scaling)
        found = judge.scores(model)
        log.info("scaling %.4g: divergence from the experts %.4f", scaling, mean_divergence(found))
        return found

    return tune(score, options.scaling_value(), factor=_FACTOR, steps=_STEPS, finer=True)


def _line(
    method: MergeMethod[Any],
    vectors: CheckpointTaskVectors,
    options: ScaledOptions,
    statistics: Any,
    names: Iterable[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merged tensors whose scaling is their own, and what scaling 1 adds to all others."""
    fixed, direction = {}, {}
    unit, none = options.at(1.0), options.at(0.0)
    for name in names:
        start, stack = vectors.with_base(name)
        context = Context(name, vectors.tasks, statistics)
        merged = method.merge_tensor(start, stack, unit, context)
        if unit.for_tensor(name).scaling_value() != none.for_tensor(name).scaling_value():
            direction[name] = merged - start
        else:
            fixed[name] = merged
    return fixed, direction


def _judge(
    recipe: Recipe,
    sources: Sources,
    options: ScaledOptions,
    device: torch.device,
    progress: Progress,
) -> Judge:
    data = load_data(
        recipe,
        sources,
        samples=options.search_samples,
        seed=0,
        heads=True,
        purpose="merge.search",
        device=device,
        progress=progress,
    )
    return Judge.of_experts(
        sources.family, sources.base.folder, data.samples, data.heads, data.expert
    )
