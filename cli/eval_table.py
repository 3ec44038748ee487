"""An evaluation for people."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from epmq_deploy.runtime.gates import NONE_RECOMMENDED, described, recommend
from epmq_deploy.runtime.markdown import cost_lines
from epmq_deploy.runtime.report import EvalReport, Row


def eval_table(report: EvalReport) -> RenderableType:
    """A column per model: accuracies with intervals, drop and costs; below it what follows."""
    table = Table(
        title="accuracy %",
        caption=f"graphs on {report.provider}; experts in torch, each on its own task\n"
        "+ and -: significantly better or worse than fp32 merged",
    )
    table.add_column("task")
    for row in report.rows:
        table.add_column(row.title, justify="right", no_wrap=True)
    for task in report.samples:
        table.add_row(task, *(f"{row.accuracy[task]:.1f}{_mark(row, task)}" for row in report.rows))
    table.add_section()
    table.add_row("average", *(f"{row.average:.2f}" for row in report.rows))
    intervals = [row.average_interval for row in report.rows]
    table.add_row("95% interval", *(f"{item.low:.1f} to {item.high:.1f}" for item in intervals))
    drops = [report.drop(row) for row in report.rows]
    table.add_row("drop against fp32 merged", *("" if d is None else f"{d:.2f}" for d in drops))
    table.add_section()
    for label, cells in cost_lines(report):
        table.add_row(label, *cells)
    verdicts = [
        f"{row.name}: {described(row)}" for row in report.rows if row.against_average is not None
    ]
    chosen = recommend(report)
    lines = [*verdicts, *_blamed(report), str(chosen or NONE_RECOMMENDED)]
    return Group(table, *(Text(line) for line in lines))


def _mark(row: Row, task: str) -> str:
    verdict = row.against[task].verdict if task in row.against else ""
    return {"better": "+", "worse": "-"}.get(verdict, " ")


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
