"""Choosing the anchor's strength on held-back calibration samples.

How strongly layers should be held to the anchor depends on the model, the merge and the number of
samples, and nothing in the objective itself says so. Candidates are calibrated without rounding on
part of every task's samples; what counts is how closely the model then predicts what the experts
predict on the rest. No labels are needed.
"""

from collections.abc import Callable

from epmq_deploy.data.agreement import Scores, Tuned, tune

_STEP = 4.0
_STEPS = 3


def search_anchor(score: Callable[[float], Scores], start: float) -> Tuned:
    """Walk from ``start`` in factors of four as long as the divergence falls.

    Another strength than ``start`` is chosen only when it is better by more than one standard error
    of the paired difference, so that noise does not decide.

    Args:
        score: divergence from the experts, sample by sample, for a strength.
        start: strength to begin with.
    """
    return tune(score, start, factor=_STEP, steps=_STEPS)
