"""Tuning a merge method's scaling on calibration samples.

How far to go along the merged task vector depends on the experts, and nothing in the weights says
so. What counts here is how the merged model predicts, on each task's samples and through its head
(`epmq_deploy.merging.objectives`). Merging uses no samples, so none of them is fitted.
"""

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from epmq_deploy.data.agreement import Scores, Tuned, mean_divergence, tune
from epmq_deploy.merging.base import Context, MergeMethod
from epmq_deploy.merging.data import RecipeData
from epmq_deploy.merging.objectives import losses
from epmq_deploy.merging.task_vectors import CheckpointTaskVectors
from epmq_deploy.options.merging import ScaledOptions

log = logging.getLogger(__name__)

_FACTOR, _STEPS = 1.5, 4


def search_scaling(
    data: RecipeData,
    method: MergeMethod[Any],
    options: ScaledOptions,
    vectors: CheckpointTaskVectors,
    statistics: Any,
) -> Tuned:
    """Find the scaling whose merge predicts best, by the objective of the options.

    The method's result is linear in its scaling, so it is merged once; two models and the merged
    task vector are in memory.

    Args:
        data: samples and experts.
        method: to merge by.
        options: of the method, with the scaling to begin with.
        vectors: the experts' task vectors.
        statistics: what the method's global pass found.
    """
    sources = data.sources
    judge = losses(data, options)
    names = data.progress.track(list(vectors.names), "merging to search")
    fixed, direction = _line(method, vectors, options, statistics, names)
    model = data.backbone()
    # Merged tensors that the model does not hold have no part in what it predicts.
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for name in fixed.keys() & parameters.keys():
        parameters[name].copy_(fixed[name])

    def score(scaling: float) -> Scores:
        for name in direction.keys() & parameters.keys():
            sources.base.load_into(name, parameters[name])
            parameters[name].add_(direction[name], alpha=scaling)
        found = judge(model)
        log.info(
            "scaling %.4g: loss by %s %.4f",
            scaling,
            options.search_objective,
            mean_divergence(found),
        )
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
