"""An evaluation for people."""

import math
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from epmq_deploy.runtime.evaluation.gates import advice, misses, verdicts
from epmq_deploy.runtime.report.markdown import cost_lines
from epmq_deploy.runtime.report.model import EvalReport

# Longer ones are wrapped before models go to another table.
_NARROWEST_LABELS = 16


def eval_table(report: EvalReport) -> RenderableType:
    """A column per model: accuracies with intervals, drop and costs; below it what follows."""
    found = [f"{name}: {said}" for name, said in verdicts(report).items()]
    missed = [f"gate missed: {text}" for text in misses(report)]
    lines = [*found, *_blamed(report), *missed, advice(report)]
    return Group(_Models(report), *(Text(line) for line in lines))


@dataclass(frozen=True)
class _Models:
    """Models side by side, in several tables of about as many where the terminal is narrow."""

    report: EvalReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sections = _sections(self.report)
        lines = [line for section in sections for line in section]
        titles = [row.title for row in self.report.rows]
        # With a border and a space on either side.
        widest = 3 + max(len(cell) for cell in [*titles, *(c for _, cells in lines for c in cells)])
        labels = 4 + min(_NARROWEST_LABELS, max(len(label) for label, _ in lines))
        fitting = max(1, (options.max_width - labels) // widest)
        tables = math.ceil(len(titles) / fitting)
        each = math.ceil(len(titles) / tables)
        for first in range(0, len(titles), each):
            chosen = slice(first, first + each)
            table = Table(title=f"{self.report.measure} %" if first == 0 else None)
            table.add_column("task", overflow="fold")
            for title in titles[chosen]:
                table.add_column(title, justify="right", no_wrap=True)
            for section in sections:
                for label, cells in section:
                    table.add_row(escape(label), *cells[chosen])
                table.add_section()
            yield table
        yield Text(
            f"graphs on {self.report.provider}; experts in torch, each on its own task\n"
            "+ and -: significantly better or worse than fp32 merged"
            + "".join(f"\n{said}" for said in self.report.other_metrics),
            style="dim italic",
        )


def _sections(report: EvalReport) -> list[list[tuple[str, list[str]]]]:
    """Labels and one cell per model: accuracies, what they come to, costs."""
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
    return [accuracies, averages, cost_lines(report)]


def _blamed(report: EvalReport) -> list[str]:
    """One line per diagnosed graph."""
    lines = []
    for name, found in report.diagnoses.items():
        worst = ", ".join(
            f"{noise.layer} ({noise.own_db:.0f} dB)"
            for noise in found.worst_first
            if noise.layer in found.blamed
        )
        average = report.row(name).against_average
        what = (
            "layers to blame"
            if average is not None and average.verdict == "worse"
            else "furthest from fp32 merged, on average at no significant loss"
        )
        lines.append(f"{name}: {what}: {worst or 'no layer stands out'}")
    return lines
