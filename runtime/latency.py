"""Batch-1 latency, measured side by side."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


class Runs(Protocol):
    """What can be timed: a graph, or graphs that write a text together."""

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        ...

    def run(self, inputs: Sequence[Tensor]) -> object:
        """Run a batch."""
        ...


@dataclass(frozen=True)
class Latency:
    """Milliseconds per run: median and 95th percentile."""

    p50_ms: float
    p95_ms: float


def measure_latency(
    graphs: Mapping[str, Runs], inputs: Sequence[Tensor], runs: int, warmup: int = 5
) -> dict[str, Latency]:
    """Time every graph on one input, taking turns so that a noisy machine favours none.

    Args:
        graphs: by name.
        inputs: a batch of one.
        runs: timed runs per graph.
        warmup: untimed runs per graph.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(warmup + runs):
        for name, graph in graphs.items():
            started = time.perf_counter()
            graph.run(inputs)
            elapsed = (time.perf_counter() - started) * 1000
            if turn >= warmup:
                times[name].append(elapsed)
    return {
        name: Latency(float(np.percentile(values, 50)), float(np.percentile(values, 95)))
        for name, values in times.items()
    }
