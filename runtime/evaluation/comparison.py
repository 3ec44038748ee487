"""Compare one model with another on the same samples: points gained, intervals, verdicts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from epmq_deploy.runtime.evaluation.metrics import Score
from epmq_deploy.runtime.evaluation.significance import (
    CONFIDENCE,
    Booleans,
    Floats,
    Interval,
    holm,
    percentiles,
)

_SEED = 0

Verdict = Literal["better", "no worse", "worse", "undecided"]


@dataclass(frozen=True)
class Difference:
    """A graph against another one on the same samples.

    Attributes:
        points: of the score gained; negative where they were lost.
        interval: of the points.
        p_value: of the score's test, Holm-adjusted over tasks; None for the average over tasks,
            whose interval decides.
        agreement: percent of samples with the same prediction.
        verdict: ``better`` or ``worse`` where that is significant at 5%; otherwise ``no worse``
            where the interval excludes a loss beyond the margin, ``undecided`` where samples are
            too few to tell.
    """

    points: float
    interval: Interval
    p_value: float | None
    agreement: float
    verdict: Verdict


def average_interval(scores: Mapping[str, Score]) -> Interval:
    """Interval of the score averaged over tasks, in percent: bootstrap, stratified by task."""
    rng = np.random.default_rng(_SEED)
    return percentiles(_mean_over([score.draws(rng) for score in scores.values()]))


def compare(
    scores: Mapping[str, Score],
    reference: Mapping[str, Score],
    same: Mapping[str, Booleans],
    margin: float,
) -> tuple[dict[str, Difference], Difference]:
    """Return a graph against the reference, by task and on average over tasks.

    Intervals are those of a paired bootstrap, stratified by task.

    Args:
        scores: of the graph, by task.
        reference: likewise.
        same: which samples both give the same prediction.
        margin: points that may be lost and still count as no worse.
    """
    rng = np.random.default_rng(_SEED)
    gains = {task: score.gains(reference[task], rng) for task, score in scores.items()}
    p_values = holm([score.p_value(reference[task], gains[task]) for task, score in scores.items()])
    tasks = {}
    for (task, score), p_value in zip(scores.items(), p_values, strict=True):
        points = score.percent - reference[task].percent
        interval = percentiles(gains[task])
        sign = 0 if p_value >= 1 - CONFIDENCE else math.copysign(1, points)
        verdict = _verdict(sign, interval, margin)
        agreement = 100 * float(same[task].mean())
        tasks[task] = Difference(points, interval, p_value, agreement, verdict)
    interval = percentiles(_mean_over(list(gains.values())))
    sign = float(interval.low > 0) - float(interval.high < 0)
    average = Difference(
        points=_mean(item.points for item in tasks.values()),
        interval=interval,
        p_value=None,
        agreement=_mean(item.agreement for item in tasks.values()),
        verdict=_verdict(sign, interval, margin),
    )
    return tasks, average


def _verdict(sign: float, interval: Interval, margin: float) -> Verdict:
    if sign:
        return "better" if sign > 0 else "worse"
    return "no worse" if interval.low >= -margin else "undecided"


def _mean_over(draws: list[Floats]) -> Floats:
    return np.asarray(np.mean(draws, axis=0))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
