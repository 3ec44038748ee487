"""Latency and throughput, measured side by side."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

_WARMUP = 5


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
        ratio: median over turns of this graph's time to the reference's in the same turn.
    """

    batch: int
    threads: int | None
    p50_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float
    ratio: float


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
    base = np.array(times[reference])
    timings = {}
    for name, values in times.items():
        p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
        ratio = float(np.median(np.array(values) / base))
        timings[name] = Timing(batch, threads, p50, p95, p99, 1000 * batch / p50, ratio)
    return timings
