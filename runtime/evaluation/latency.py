"""Latency and throughput, measured side by side."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from epmq_deploy.runtime.evaluation.significance import CONFIDENCE, Interval

_WARMUP = 5
# Fewer runs tell nothing: of two graphs equally fast, one is faster in all of three runs than the
# other in any of its three one time in ten.
_FEWEST = 4


class Runs(Protocol):
    """What can be timed: a graph, or graphs that write a text together."""

    @property
    def provider(self) -> str:
        """The execution provider in use."""

    def run(self, inputs: Sequence[Tensor]) -> object:
        """Run a batch."""


@dataclass(frozen=True)
class Timing:
    """Runs of one graph with one batch size and one number of threads.

    Attributes:
        batch: samples per run.
        threads: intra-op threads, None for onnxruntime's default.
        p50_ms: median milliseconds per run; p95 and p99 likewise.
        throughput: samples per second at the median.
        ratio: of this graph's lower quartile to the reference's, which other programs on the
            machine disturb less than medians.
        ratio_interval: of the median over turns of this graph's time to the reference's; None where
            there were too few runs to tell.
    """

    batch: int
    threads: int | None
    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float
    ratio: float
    ratio_interval: Interval | None = None


def measure_latency(
    graphs: Mapping[str, Runs],
    reference: str,
    inputs: Sequence[Tensor],
    threads: int | None,
    runs: int,
    warmup: int = _WARMUP,
) -> dict[str, Timing]:
    """Time every graph on one batch, taking turns so that a noisy machine favours none.

    Each turn begins with another graph, so that none always runs after the same one.

    Args:
        graphs: by name, with that many threads.
        reference: the graph that ratios are taken against.
        inputs: a batch.
        threads: of the graphs, for the record.
        runs: timed runs per graph.
        warmup: untimed runs per graph.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for turn in range(warmup + runs):
        start = turn % len(order)
        for name in order[start:] + order[:start]:
            started = time.perf_counter()
            graphs[name].run(inputs)
            elapsed = (time.perf_counter() - started) * 1000
            if turn >= warmup:
                times[name].append(elapsed)
    batch = len(inputs[0])
    base = float(np.percentile(times[reference], 25))
    timings = {}
    for name, values in times.items():
        p25, p50, p95, p99 = (float(value) for value in np.percentile(values, (25, 50, 95, 99)))
        timings[name] = Timing(
            batch=batch,
            threads=threads,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            throughput=1000 * batch / p50,
            ratio=p25 / base,
            ratio_interval=median_interval(
                [own / other for own, other in zip(values, times[reference], strict=True)]
            ),
        )
    return timings


def median_interval(values: Sequence[float]) -> Interval | None:
    """95% interval of a median between two of the values, whatever their distribution.

    As many values as possible are left out at either end so that the sign test still rejects what
    lies outside (Conover, Practical Nonparametric Statistics, 1999, section 3.2). That is none with
    fewer than six values; of fewer than four, None is returned.
    """
    count = len(values)
    if count < _FEWEST:
        return None
    left_out, tail = 0, 1
    # Integers divide to the nearest float however large they are.
    while 2 * (tail := tail + math.comb(count, left_out + 1)) / 2**count <= 1 - CONFIDENCE:
        left_out += 1
    ordered = sorted(values)
    return Interval(ordered[left_out], ordered[count - 1 - left_out])
