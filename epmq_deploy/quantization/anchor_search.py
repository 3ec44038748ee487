"""Choosing the anchor's strength on held-back calibration samples.

How strongly layers should be held to the anchor depends on the model, the merge and the number of
samples, and nothing in the objective itself says so. Candidates are calibrated without rounding on
part of every task's samples; what counts is how closely the model then predicts what the experts
predict on the rest. No labels are needed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

# Divergences of each task's held-back samples, ``[n]``.
Scores = Mapping[str, Tensor]
_STEP = 4.0
_STEPS = 3


@dataclass(frozen=True)
class AnchorSearch:
    """What a search found.

    Attributes:
        anchor: the strength chosen.
        curve: mean divergence from the experts by strength tried.
        standard_error: of the difference between the best and the starting strength.
    """

    anchor: float
    curve: dict[float, float]
    standard_error: float


def search_anchor(score: Callable[[float], Scores], start: float) -> AnchorSearch:
    """Walk from ``start`` in factors of four as long as the divergence falls.

    Another strength than ``start`` is chosen only when it is better by more than one standard error
    of the paired difference, so that noise does not decide.

    Args:
        score: divergence from the experts, sample by sample, for a strength.
        start: strength to begin with.
    """
    found = {start: score(start)}
    for direction in (_STEP, 1 / _STEP):
        last = start
        for _ in range(_STEPS):
            candidate = last * direction
            found[candidate] = score(candidate)
            if _mean(found[candidate]) >= _mean(found[last]):
                break
            last = candidate
    best = min(found, key=lambda strength: _mean(found[strength]))
    error = standard_error(found[best], found[start])
    better = _mean(found[start]) - _mean(found[best]) > error
    curve = {strength: _mean(found[strength]) for strength in sorted(found)}
    return AnchorSearch(best if better else start, curve, error)


def divergence(logits: Tensor, expert_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a model's predictions from the expert's, ``[n]``, in nats.

    Args:
        logits: the model's, ``[n, C]``.
        expert_logits: the expert's, likewise.
    """
    wanted = expert_logits.log_softmax(dim=1)
    return (wanted.exp() * (wanted - logits.log_softmax(dim=1))).sum(dim=1)


def standard_error(first: Scores, second: Scores) -> float:
    """Standard error of the difference of two means over tasks, samples paired."""
    variance = 0.0
    for task, values in first.items():
        difference = values - second[task]
        if len(difference) > 1:
            variance += float(difference.var()) / len(difference)
    return math.sqrt(variance) / max(len(first), 1)


def _mean(scores: Scores) -> float:
    return sum(float(values.mean()) for values in scores.values()) / max(len(scores), 1)
