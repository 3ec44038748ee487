"""Tables of the report's page, as plain data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from epmq_deploy.quantization.results import LayerReport
from epmq_deploy.runtime.evaluation.diagnosis import Diagnosis
from epmq_deploy.runtime.evaluation.report import EvalReport
from epmq_deploy.runtime.report.markdown import cost_lines


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading.

    Attributes:
        caption: what it shows.
        titles: of the columns.
        rows: cells as text.
    """

    caption: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


def accuracy_table(report: EvalReport) -> Table:
    """Return percent and interval by task and model, and how each compares with fp32 merged."""
    rows = []
    for task in [*report.samples, None]:
        for row in report.rows:
            percent = row.average if task is None else row.accuracy[task]
            interval = row.average_interval if task is None else row.intervals[task]
            difference = row.against_average if task is None else row.against.get(task)
            against = ["", "", "", ""]
            if difference is not None:
                low, high = difference.interval.low, difference.interval.high
                against = [
                    f"{difference.points:+.2f} [{low:.1f}, {high:.1f}]",
                    difference.verdict,
                    "" if difference.p_value is None else f"{difference.p_value:.3g}",
                    f"{difference.agreement:.1f}",
                ]
            score = f"{percent:.2f} [{interval.low:.1f}, {interval.high:.1f}]"
            rows.append([task or "average", row.title, score, *against])
    measure = f"{report.measure}, %"
    titles = ["task", "model", measure, "points gained", "verdict", "p", "agrees, %"]
    return Table(f"{report.measure.capitalize()} of every model on every task", titles, rows)


def metric_table(report: EvalReport) -> Table | None:
    """Return metrics beside each task's score; None where no task has any."""
    rows = [[label, *cells] for label, cells in report.further_metrics]
    titles = ["task, metric", *(row.title for row in report.rows)]
    return Table("Further metrics, times 100", titles, rows) if rows else None


def class_table(report: EvalReport) -> Table | None:
    """Return how many of each class's samples are predicted; None where tasks have no classes."""
    rows = [
        [task, name, *("" if cell is None else f"{cell:.1f}" for cell in cells)]
        for task, names in report.class_names.items()
        for name, *cells in zip(
            names, *(row.recalls.get(task, ()) for row in report.rows), strict=False
        )
    ]
    titles = ["task", "class", *(row.title for row in report.rows)]
    return (
        Table("Correct predictions among each class's samples, %", titles, rows) if rows else None
    )


def cost_table(report: EvalReport) -> Table:
    """Return size, load time, memory and latencies of every graph."""
    graphs = [row for row in report.rows if row.timings]
    skip = len(report.rows) - len(graphs)
    rows = [[label, *cells[skip:]] for label, cells in cost_lines(report)]
    return Table("What each graph costs", ["", *(row.title for row in graphs)], rows)


def noise_table(diagnosis: Diagnosis) -> Table:
    """Return layers of one graph against fp32 merged, the worst first."""
    rows = [
        [noise.layer, f"{noise.own_db:.1f}", f"{noise.output_db:.1f}"]
        for noise in diagnosis.worst_first
    ]
    titles = ["layer", "layer alone", "with earlier layers"]
    return Table("Signal-to-noise ratio of each layer, dB", titles, rows)


def layer_table(layers: Iterable[LayerReport]) -> Table:
    """Return status and errors of each layer in quantization."""
    rows = [
        [
            layer.layer,
            layer.status,
            str(layer.bits or ""),
            str(layer.group_size or ""),
            f"{layer.error_before:.2e}" if layer.bits else "",
            f"{layer.error_after:.2e}" if layer.bits else "",
            layer.reason,
        ]
        for layer in layers
    ]
    titles = ["layer", "status", "bits", "group", "rounding error", "final error", "reason"]
    return Table("Layers in quantization, with errors relative to their target", titles, rows)
