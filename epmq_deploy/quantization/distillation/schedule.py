"""The learning rate over a run: a warm-up, then half a cosine down to nothing."""

import math

# Share of all steps in which the rate rises.
_WARM_UP = 0.1


def rate_at(step: int, steps: int, highest: float) -> float:
    """Return the learning rate of a step.

    Args:
        step: from 0.
        steps: of the run.
        highest: at the end of the warm-up.
    """
    warm_up = max(round(_WARM_UP * steps), 1)
    if step < warm_up:
        return highest * (step + 1) / warm_up
    left = (step - warm_up) / max(steps - warm_up, 1)
    return highest * (0.5 * (1 + math.cos(math.pi * left)))
