"""Measuring the graphs of an export side by side: time, memory, layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from epmq_deploy.models import ModelFamily
from epmq_deploy.progress import Progress
from epmq_deploy.recipe import EvalOptions
from epmq_deploy.runtime.diagnosis import Diagnosis, diagnose
from epmq_deploy.runtime.footprint import Footprint, measure_footprint, median_footprint
from epmq_deploy.runtime.latency import Timing, measure_latency
from epmq_deploy.runtime.providers import provider_named
from epmq_deploy.runtime.report import REFERENCE, REFERENCES
from epmq_deploy.runtime.sessions import Graph
from epmq_deploy.tasks.data import Samples, batches

_FOOTPRINTS = 3


@dataclass(frozen=True)
class Bench:
    """An export's graphs and what to measure them with.

    Attributes:
        exported: its folder.
        family: of the model.
        samples: by task.
        options: of the evaluation.
        provider: that runs the graphs.
        entries: what the manifest says of each graph.
        progress: to report to.
    """

    exported: Path
    family: ModelFamily
    samples: Mapping[str, Samples]
    options: EvalOptions
    provider: str
    entries: tuple[Mapping[str, Any], ...]
    progress: Progress

    @property
    def threads(self) -> tuple[int | None, ...]:
        """Numbers of threads to time; the first one serves accuracies."""
        return self.options.threads or (None,)

    def file(self, entry: Mapping[str, Any]) -> Path:
        """A graph's file."""
        return self.exported / str(entry["file"])

    def graphs(self, threads: int | None) -> dict[str, Graph]:
        """All graphs by format."""
        return {
            entry["format"]: Graph(
                self.file(entry),
                provider=self.provider,
                threads=threads,
                session_config=entry["session_config"],
            )
            for entry in self.entries
        }

    def batch(self, size: int) -> tuple[Tensor, ...]:
        """The first samples of the first task, repeated where there are too few."""
        chosen = next(iter(self.samples.values()))
        raw = chosen.inputs(0, min(size, len(chosen)))
        return self.family.collate(self.exported, [raw[index % len(raw)] for index in range(size)])

    def costs(self) -> dict[str, dict[str, Any]]:
        """Attributes of each graph's row that tell what it costs, by format."""
        timings = self._timings()
        footprints = self._footprints()
        return {
            entry["format"]: {
                "file": entry["file"],
                "bytes": entry["bytes"],
                "timings": tuple(timings[entry["format"]]),
                "footprint": footprints[entry["format"]],
            }
            for entry in self.entries
        }

    def _timings(self) -> dict[str, list[Timing]]:
        found: dict[str, list[Timing]] = {entry["format"]: [] for entry in self.entries}
        batches_of = [self.batch(size) for size in self.options.latency_batches]
        settings = [(threads, batch) for threads in self.threads for batch in batches_of]
        for threads, batch in self.progress.track(settings, "timing", total=len(settings)):
            graphs = self.graphs(threads)
            timed = measure_latency(graphs, REFERENCE, batch, threads, self.options.latency_runs)
            for name, timing in timed.items():
                found[name].append(timing)
        return found

    def _footprints(self) -> dict[str, Footprint]:
        one = self.batch(1)
        feed = {
            name: value.numpy() for name, value in zip(self.family.input_names, one, strict=True)
        }
        measured: dict[str, list[Footprint]] = {entry["format"]: [] for entry in self.entries}
        # Turns, so that a noisy machine favours none.
        turns = [entry for _ in range(_FOOTPRINTS) for entry in self.entries]
        for entry in self.progress.track(turns, "loading", total=len(turns)):
            footprint = measure_footprint(
                self.file(entry),
                feed,
                provider=provider_named(self.provider),
                threads=self.threads[0],
                session_config=entry["session_config"],
            )
            measured[entry["format"]].append(footprint)
        return {name: median_footprint(found) for name, found in measured.items()}

    def diagnoses(self) -> dict[str, Diagnosis]:
        """Layers of the low-bit graphs against those of fp32 merged."""
        files = {entry["format"]: self.file(entry) for entry in self.entries}
        low = [entry for entry in self.entries if entry["format"] not in REFERENCES]
        return diagnose(
            files[REFERENCE],
            {entry["format"]: files[entry["format"]] for entry in low},
            {entry["format"]: entry["session_config"] for entry in low},
            list(self._few()),
            provider=self.provider,
            threads=self.threads[0],
        )

    def _few(self) -> Iterator[tuple[Tensor, ...]]:
        """Some samples of every task, each a batch of its own."""
        count = self.options.diagnose_samples
        for chosen in self.samples.values():
            for index, inputs in enumerate(batches(chosen, self.family, self.exported, 1)):
                if index == count:
                    break
                yield inputs
