"""Settling options that depend on the model: the anchor's strength and bits per layer.

How strongly layers should be held to the anchor depends on the model, the merge and the number of
samples, and the objective itself does not decide it. Candidates are calibrated without rounding on
part of every task's samples, and compared by how closely the model then predicts what the experts
predict on the rest. No labels are needed.

Bits per layer are chosen under a budget, from each layer's exact error at each width.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from epmq_deploy.artifacts.manifest import AnchorPlan, BitPlan
from epmq_deploy.data.agreement import Scores, Tuned, mean_divergence, tune
from epmq_deploy.errors import RecipeError
from epmq_deploy.options.quantization import LayerOptions, QuantizeOptions
from epmq_deploy.quantization.base import AnchorSearch
from epmq_deploy.quantization.context import CalibrationContext

log = logging.getLogger(__name__)

# Of every four samples of a task, three calibrate and one scores while the anchor is searched for.
_HELD_BACK = 4
# The search: factor between two strengths, and most steps in one direction.
_FACTOR = 4.0
_STEPS = 3


def search_anchor(score: Callable[[float], Scores], start: float) -> Tuned:
    """Walk from ``start`` in factors of four as long as the divergence falls.

    Another strength than ``start`` is chosen only when it is better by more than one standard error
    of the paired difference, so that noise does not decide.

    Args:
        score: divergence from the experts, sample by sample, for a strength.
        start: strength to begin with.
    """
    return tune(score, start, factor=_FACTOR, steps=_STEPS)


def plan_anchor(search: AnchorSearch[Any], ctx: CalibrationContext) -> AnchorPlan:
    """Search the anchor's strength by how closely held-back samples are predicted.

    Raises:
        RecipeError: there is nothing to search on.
    """
    few = [task for task, samples in ctx.samples.items() if len(samples) < 2 * _HELD_BACK]
    if few or not ctx.samples:
        raise RecipeError(
            f"quantize.anchor: auto needs at least {2 * _HELD_BACK} calibration samples for every "
            "task; give a number instead"
        )
    held_back, fitted = {}, {}
    for task, samples in ctx.samples.items():
        count = len(samples) // _HELD_BACK
        held_back[task] = replace(samples, indices=samples.indices[:count])
        fitted[task] = replace(samples, indices=samples.indices[count:])
    fitting = replace(ctx, samples=fitted)
    judge = ctx.judge(held_back)

    def score(strength: float) -> Scores:
        model, _ = fitting.calibrate(search.options_with(strength), rounding=False)
        scores = judge.scores(model)
        log.info("anchor %g: divergence from the experts %.4f", strength, mean_divergence(scores))
        return scores

    tuned = search_anchor(score, search.start)
    return AnchorPlan(
        anchor=tuned.value,
        curve=tuple(tuned.curve.items()),
        standard_error=tuned.standard_error,
    )


@dataclass(frozen=True)
class Choice:
    """Error and size of a layer at each width.

    Attributes:
        errors: relative error of the layer's objective, by bits.
        sizes: bits stored with scales and zero points, by bits.
    """

    errors: Mapping[int, float]
    sizes: Mapping[int, float]


def allocate(layers: Mapping[str, Choice], budget: float) -> dict[str, int]:
    """Choose bits per layer with the least summed error whose summed size is within ``budget``.

    Starts from the smallest widths and spends the rest where it lowers the error most per bit
    stored, along each layer's lower convex hull: what a Lagrangian multiplier would choose
    (Shoham and Gersho, 1988), filled up to the budget.

    Args:
        layers: choices by layer.
        budget: bits for all layers together.

    Raises:
        ValueError: even the smallest widths exceed the budget.
    """
    chosen = {
        name: min(choice.sizes, key=lambda bits: choice.sizes[bits])
        for name, choice in layers.items()
    }
    spent = sum(layers[name].sizes[bits] for name, bits in chosen.items())
    if spent > budget:
        raise ValueError(f"the smallest widths take {spent:g} bits, more than {budget:g}")
    while True:
        best, gain = None, 0.0
        for name, choice in layers.items():
            now = chosen[name]
            for bits, size in choice.sizes.items():
                extra = size - choice.sizes[now]
                saved = choice.errors[now] - choice.errors[bits]
                if extra > 0 and spent + extra <= budget and saved / extra > gain:
                    best, gain = (name, bits), saved / extra
        if best is None:
            return chosen
        name, bits = best
        spent += layers[name].sizes[bits] - layers[name].sizes[chosen[name]]
        chosen[name] = bits


def plan_bits(options: QuantizeOptions, ctx: CalibrationContext) -> BitPlan:
    """Choose bits per layer for ``target_bits`` or ``target_size``.

    Layers whose bits ``quantize.layers`` fixes keep them, and count.

    Raises:
        RecipeError: see ``bit_budget``.
    """
    budget = ctx.bit_budget(options)
    _, result = ctx.calibrate(options, rounding=False, probe=budget.choices)
    chosen = allocate(
        {
            name: Choice(result.errors.get(name, dict.fromkeys(sizes, 0.0)), sizes)
            for name, sizes in budget.sizes.items()
        },
        budget.bits,
    )
    bits = sum(width * budget.weights[name] for name, width in chosen.items())
    return BitPlan(layers=chosen, mean_bits=bits / sum(budget.weights.values()))


def with_bits(options: QuantizeOptions, bits: Mapping[str, int]) -> QuantizeOptions:
    """Return options in which each layer has the bits given."""
    chosen = {
        name: options.layers.get(name, LayerOptions()).model_copy(update={"bits": width})
        for name, width in bits.items()
    }
    return options.model_copy(update={"layers": {**options.layers, **chosen}})
