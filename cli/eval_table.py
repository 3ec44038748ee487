"""Evaluation reports as terminal tables."""

import math
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from epmq_deploy.runtime.evaluation.gates import advice, misses, verdicts
from epmq_deploy.runtime.evaluation.report import EvalReport
from epmq_deploy.runtime.report.markdown import cost_lines

# Of the task column: longer labels are wrapped before models move to another table.
_LABEL_WIDTH = 16


def eval_table(report: EvalReport) -> RenderableType:
    """Return one column per model, with verdicts, missed gates and the recommendation below.

    Rows are accuracies with their intervals, the drop against fp32 merged, and costs.
    """
    lines = [
        *(f"{name}: {verdict}" for name, verdict in verdicts(report).items()),
        *_diagnoses(report),
        *(f"gate missed: {text}" for text in misses(report)),
        advice(report),
    ]
    return Group(_Models(report), *(Text(line) for line in lines))


@dataclass(frozen=True)
class _Models:
    """Models side by side, in several tables of similar width if the terminal is narrow."""

    report: EvalReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sections = _sections(self.report)
        lines = [line for section in sections for line in section]
        titles = [row.title for row in self.report.rows]
        cells = [*titles, *(cell for _, row in lines for cell in row)]
        # With a border and a space on either side.
        model_width = 3 + max(len(cell) for cell in cells)
        label_width = 4 + min(_LABEL_WIDTH, max(len(label) for label, _ in lines))
        models_per_line = max(1, (options.max_width - label_width) // model_width)
        tables = math.ceil(len(titles) / models_per_line)
        models_per_table = math.ceil(len(titles) / tables)
        for first in range(0, len(titles), models_per_table):
            columns = slice(first, first + models_per_table)
            table = Table(title=f"{self.report.measure} %" if first == 0 else None)
            table.add_column("task", overflow="fold")
            for title in titles[columns]:
                table.add_column(title, justify="right", no_wrap=True)
            for section in sections:
                for label, row in section:
                    table.add_row(escape(label), *row[columns])
                table.add_section()
            yield table
        yield Text(
            f"graphs on {self.report.provider}; experts in torch, each on its own task\n"
            "+ and -: significantly better or worse than fp32 merged"
            + "".join(f"\n{remark}" for remark in self.report.remarks),
            style="dim italic",
        )


def _sections(report: EvalReport) -> list[list[tuple[str, list[str]]]]:
    """Return labels with one cell per model: accuracies, averages, costs."""
    accuracies = [
        (task, [f"{row.accuracy[task]:.1f}{row.mark(task) or ' '}" for row in report.rows])
        for task in report.samples
    ]
    intervals = [row.average_interval for row in report.rows]
    drops = [report.drop(row) for row in report.rows]
    averages = [
        ("average", [f"{row.average:.2f}" for row in report.rows]),
        ("95% interval", [f"{item.low:.1f} to {item.high:.1f}" for item in intervals]),
        ("drop against fp32 merged", ["" if d is None else f"{d:.2f}" for d in drops]),
    ]
    sections = [accuracies, report.further_metrics, averages, cost_lines(report)]
    return [section for section in sections if section]


def _diagnoses(report: EvalReport) -> list[str]:
    """Return one line per diagnosed graph, naming the layers that cost accuracy."""
    lines = []
    for name, diagnosis in report.diagnoses.items():
        worst = ", ".join(
            f"{noise.layer} ({noise.own_db:.0f} dB)"
            for noise in diagnosis.worst_first
            if noise.layer in diagnosis.blamed
        )
        average = report.row(name).against_average
        meaning = (
            "layers whose own error is largest"
            if average is not None and average.verdict == "worse"
            else "layers that differ most from fp32 merged (average accuracy is not significantly "
            "lower)"
        )
        lines.append(f"{name}: {meaning}: {worst or 'no layer stands out'}")
    return lines
