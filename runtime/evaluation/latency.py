"""Latency and throughput, measured interleaved in one run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from epmq_deploy.runtime.evaluation.significance import Interval, median_interval

_WARMUP = 5


class Runs(Protocol):
    """Something that can be timed: a graph, or graphs that generate text together."""

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
        threads: intra-op threads; None where onnxruntime chose, as the system does not say how many
            cores may be used.
        p50_ms: median milliseconds per run; p95 and p99 likewise.
        throughput: samples per second at the median.
        ratio: median over rounds of this graph's time to the reference's in the same round.
        ratio_interval: of that median, 95%; None where there were too few runs to tell.
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
    """Time every graph on one batch, interleaved so that a noisy machine favours none.

    Each round begins with another graph, so that none always runs after the same one.

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
    timings = {}
    for name, values in times.items():
        p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
        ratios = [one / other for one, other in zip(values, times[reference], strict=True)]
        timings[name] = Timing(
            batch=batch,
            threads=threads,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            throughput=1000 * batch / p50,
            ratio=float(np.median(ratios)),
            ratio_interval=median_interval(ratios),
        )
    return timings
