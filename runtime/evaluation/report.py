"""The results of an evaluation, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from epmq_deploy.quantization.results import LayerReport
from epmq_deploy.runtime.evaluation.comparison import Difference
from epmq_deploy.runtime.evaluation.diagnosis import Diagnosis
from epmq_deploy.runtime.evaluation.latency import Timing
from epmq_deploy.runtime.evaluation.significance import Interval
from epmq_deploy.runtime.ort.footprint import Footprint

EXPERTS = "experts"
REFERENCE = "fp32"
# The references of reports that do not say which rows are low-bit: those of earlier versions.
_FORMER_REFERENCES = (EXPERTS, REFERENCE, "fp16")


@dataclass(frozen=True)
class Row:
    """One model's results.

    Attributes:
        name: a format's name, or ``experts``.
        accuracy: percent by task, or what its metric gives in place of accuracy.
        intervals: of these, 95%.
        average_interval: of their average over tasks.
        against: differences from fp32 merged by task; empty for experts and fp32 merged itself.
        against_average: the difference on average over tasks.
        files: relative to the export's folder, in the order they run; none for experts, as of all
            that follows.
        bytes: size of the files, external data included.
        timings: by batch size and threads, in the order asked for.
        footprint: load time and memory.
        low_bit: whether it is a low-bit graph, held against gates and recommended; others are
            references. None in reports of earlier versions.
        metrics: times 100, by task and name of the metric; the first is ``accuracy``.
        recalls: by task, the percentage of each class's samples that are predicted; None for
            classes without samples.
    """

    name: str
    accuracy: Mapping[str, float]
    intervals: Mapping[str, Interval]
    average_interval: Interval
    against: Mapping[str, Difference] = field(default_factory=dict)
    against_average: Difference | None = None
    files: tuple[str, ...] = ()
    bytes: int | None = None
    timings: tuple[Timing, ...] = ()
    footprint: Footprint | None = None
    low_bit: bool | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    recalls: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    @property
    def is_candidate(self) -> bool:
        """Whether it is a low-bit graph."""
        return self.name not in _FORMER_REFERENCES if self.low_bit is None else self.low_bit

    @property
    def average(self) -> float:
        """Accuracy averaged over tasks, percent."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def mark(self, task: str) -> str:
        """``+`` or ``-`` where it is significantly better or worse than fp32 merged."""
        verdict = self.against[task].verdict if task in self.against else ""
        return {"better": "+", "worse": "-"}.get(verdict, "")

    @property
    def title(self) -> str:
        """What tables call it."""
        return "fp32 merged" if self.name == REFERENCE else self.name


@dataclass(frozen=True)
class Gates:
    """What a low-bit graph has to meet to be deployed; None where there is no limit.

    Attributes:
        max_drop: points of average accuracy lost against fp32 merged (the point estimate; its
            interval is reported with it).
        max_latency_ratio: latency relative to fp32 merged, of the first timing.
        max_size: size of all its files in MB (10^6 bytes).
    """

    max_drop: float | None = None
    max_latency_ratio: float | None = None
    max_size: float | None = None


@dataclass(frozen=True)
class EvalReport:
    """Results of all models on all tasks.

    Attributes:
        rows: experts (where evaluated), then every graph.
        samples: evaluation samples by task.
        provider: onnxruntime's execution provider that ran the graphs.
        gates: what a low-bit graph has to meet to be deployed.
        margin: points that may be lost and still count as no worse.
        fingerprint: of exported model, data and options.
        diagnoses: by format, where asked for.
        layers: how each layer fared in quantization, where the export holds its report.
        metrics: by task, what stands in for accuracy; empty texts where nothing does.
        hub_metrics: by task, the metric as the Hugging Face hub names it.
        assumptions: a sentence for each task whose labels were taken on trust.
        imbalances: a sentence for each task with one class that outweighs the others.
        class_names: by task, in the order of ``Row.recalls``.
    """

    rows: tuple[Row, ...]
    samples: Mapping[str, int]
    provider: str
    gates: Gates
    margin: float
    fingerprint: str
    diagnoses: Mapping[str, Diagnosis]
    layers: tuple[LayerReport, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    hub_metrics: Mapping[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    imbalances: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def other_metrics(self) -> tuple[str, ...]:
        """A sentence for each task that is not scored by accuracy."""
        return tuple(f"{task}: {metric}" for task, metric in self.metrics.items() if metric)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What has to be known to read the percentages: other metrics, and what was assumed."""
        return (*self.other_metrics, *self.assumptions, *self.imbalances)

    @property
    def further_metrics(self) -> list[tuple[str, list[str]]]:
        """Return metrics beside each task's score: what they are, and one cell per row."""
        first = self.rows[0].metrics
        return [
            (f"{task}, {name}", [f"{row.metrics[task][name]:.1f}" for row in self.rows])
            for task in self.samples
            for name in list(first.get(task, {}))[1:]
        ]

    @property
    def measure(self) -> str:
        """What percentages are, over all tasks."""
        return "accuracy or score" if self.other_metrics else "accuracy"

    def row(self, name: str) -> Row:
        """Return the row of a format or of the experts."""
        return next(row for row in self.rows if row.name == name)

    @property
    def candidates(self) -> tuple[Row, ...]:
        """The low-bit graphs."""
        return tuple(row for row in self.rows if row.is_candidate)

    def drop(self, row: Row) -> float | None:
        """Points of average accuracy lost against fp32 merged; None for the experts."""
        return None if row.name == EXPERTS else self.row(REFERENCE).average - row.average
