"""Choosing the anchor's strength on held-back calibration samples.

How strongly layers should be held to the anchor depends on the model, the merge and the number of
samples, and nothing in the objective itself says so. Candidates are calibrated without rounding on
part of every task's samples; what counts is how closely the model then predicts what the experts
predict on the rest. No labels are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from epmq_deploy.tasks.agreement import Scores, tune

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
    found = tune(score, start, factor=_STEP, steps=_STEPS)
    return AnchorSearch(found.value, found.curve, found.standard_error)
