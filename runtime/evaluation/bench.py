"""Measuring the graphs of an export side by side: time, memory, layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq_deploy.artifacts.manifest import GraphEntry
from epmq_deploy.cpu import usable_cores
from epmq_deploy.data.samples import Samples
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import EvalOptions
from epmq_deploy.runtime.evaluation.diagnosis import Diagnosis, diagnose
from epmq_deploy.runtime.evaluation.latency import Timing, measure_latency
from epmq_deploy.runtime.evaluation.report import REFERENCE
from epmq_deploy.runtime.evaluation.scoring import Scorer
from epmq_deploy.runtime.ort.footprint import Footprint, measure_footprint, median_footprint
from epmq_deploy.runtime.ort.providers import provider_named
from epmq_deploy.runtime.ort.sessions import task_numbers

_FOOTPRINTS = 3


@dataclass(frozen=True)
class Bench:
    """An export's graphs and what to measure them with.

    Attributes:
        exported: its folder.
        formats: what the manifest says of each format's graphs: one, or the parts of a
            text-generation model.
        scorer: opens and feeds them.
        samples: by task.
        options: of the evaluation.
        provider: that runs the graphs.
        progress: to report to.
    """

    exported: Path
    formats: Mapping[str, tuple[GraphEntry, ...]]
    scorer: Scorer[Any, Any]
    samples: Mapping[str, Samples]
    options: EvalOptions
    provider: str
    progress: Progress

    @property
    def threads(self) -> tuple[int | None, ...]:
        """Numbers of threads to time; the first one serves accuracies."""
        return self.options.threads or (usable_cores(),)

    def costs(self) -> dict[str, dict[str, Any]]:
        """Return attributes of each format's row: latencies, memory, size."""
        timings = self._timings()
        footprints = self._footprints()
        return {
            name: {
                "files": tuple(entry.file for entry in entries),
                "bytes": sum(entry.bytes for entry in entries),
                "timings": tuple(timings[name]),
                "footprint": footprints[name],
                "low_bit": entries[0].low_bit,
            }
            for name, entries in self.formats.items()
        }

    def _timings(self) -> dict[str, list[Timing]]:
        timings: dict[str, list[Timing]] = {name: [] for name in self.formats}
        inputs = [self._batch(size) for size in self.options.latency_batches]
        settings = [(threads, batch) for threads in self.threads for batch in inputs]
        for threads, batch in self.progress.track(settings, "timing", total=len(settings)):
            models = self.scorer.open(threads)
            timed = measure_latency(models, REFERENCE, batch, threads, self.options.latency_runs)
            for name, timing in timed.items():
                timings[name].append(timing)
        return timings

    def _footprints(self) -> dict[str, Footprint]:
        one = [value.numpy() for value in self._batch(1)]
        measured: dict[str, list[Footprint]] = {name: [] for name in self.formats}
        # Turns, so that a noisy machine favours none.
        turns = [name for _ in range(_FOOTPRINTS) for name in self.formats]
        for name in self.progress.track(turns, "measuring memory", total=len(turns)):
            entries = self.formats[name]
            footprint = measure_footprint(
                [self.exported / entry.file for entry in entries],
                [*one, task_numbers(0, 1).numpy()] if entries[0].task_input else one,
                provider=provider_named(self.provider),
                threads=self.threads[0],
                session_config=entries[0].session_options,
                special_tokens=self.scorer.special_tokens,
            )
            measured[name].append(footprint)
        return {name: median_footprint(footprints) for name, footprints in measured.items()}

    def diagnoses(self) -> dict[str, Diagnosis]:
        """Layers of the low-bit graphs against those of fp32 merged, one graph a format."""
        few = list(self._few())
        low = {name: graphs[0] for name, graphs in self.formats.items() if graphs[0].low_bit}
        return diagnose(
            self.exported / self.formats[REFERENCE][0].file,
            {name: self.exported / entry.file for name, entry in low.items()},
            {name: entry.session_options for name, entry in low.items()},
            [batch for _, batch in few],
            [task for task, _ in few],
            {name: entry.task_input for name, entry in low.items()},
            provider=self.provider,
            threads=self.threads[0],
        )

    def _batch(self, size: int) -> tuple[Tensor, ...]:
        return self.scorer.batch(next(iter(self.samples.values())), 0, size)

    def _few(self) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Yield some samples of every task with its name, each a batch of its own."""
        for task, chosen in self.samples.items():
            for index in range(min(self.options.diagnose_samples, len(chosen))):
                yield task, self.scorer.batch(chosen, index, 1)
