"""The evaluation as a Markdown table, for model cards."""

from epmq_deploy.runtime.evaluation.gates import advice, misses, verdicts
from epmq_deploy.runtime.evaluation.report import EvalReport, Row


def markdown_table(report: EvalReport) -> str:
    """Accuracies with intervals, size and speed of all models, and what to deploy; no heading."""
    titles = ["", *(row.title for row in report.rows)]
    lines = [_line(titles), _line(["---", *("--:" for _ in report.rows)])]
    for task in report.samples:
        lines.append(_line([_escaped(task), *(_percent(row, task) for row in report.rows)]))
    lines += [_line([_escaped(label), *cells]) for label, cells in report.further_metrics]
    intervals = (
        f"**{row.average:.2f}** [{row.average_interval.low:.1f}, {row.average_interval.high:.1f}]"
        for row in report.rows
    )
    lines.append(_line(["**average** [95% interval]", *intervals]))
    for label, cells in cost_lines(report):
        lines.append(_line([label, *cells]))
    return "\n".join([*lines, "", *notes(report)]) + "\n"


def cost_lines(report: EvalReport) -> list[tuple[str, list[str]]]:
    """Label and one cell per row: agreement, size, load time, memory, latencies."""
    lines = [
        (
            "agrees with fp32 merged, %",
            [
                f"{row.against_average.agreement:.1f}" if row.against_average else ""
                for row in report.rows
            ],
        ),
        ("file, MB", [f"{row.bytes / 1e6:.2f}" if row.bytes else "" for row in report.rows]),
        (
            "load, ms",
            [f"{row.footprint.load_ms:.0f}" if row.footprint else "" for row in report.rows],
        ),
        ("peak memory, MB", [_memory(row) for row in report.rows]),
    ]
    settings = next(row.timings for row in report.rows if row.timings)
    several = len({timing.threads for timing in settings}) > 1
    for index, setting in enumerate(settings):
        where = f"batch {setting.batch}"
        if several:
            where += f", {setting.threads} threads"
        timings = [row.timings[index] if row.timings else None for row in report.rows]
        lines += [
            (
                f"{where}, ms p50 (p95)",
                [f"{t.p50_ms:.2f} ({t.p95_ms:.2f})" if t else "" for t in timings],
            ),
            (f"{where}, samples/s", [f"{t.throughput:.0f}" if t else "" for t in timings]),
            (f"{where}, time / fp32", [f"{t.ratio:.2f}" if t else "" for t in timings]),
        ]
    return lines


def notes(report: EvalReport) -> list[str]:
    """Return notes: marks, each format's verdict, missed gates and what to deploy."""
    threads = sorted({str(t.threads or "default") for row in report.rows for t in row.timings})
    lines = [
        f"- Graphs on {report.provider}, threads: {', '.join(threads)}; experts in torch, each on "
        "its own task. \\+ and \\-: significantly better or worse than fp32 merged on that task "
        "(exact McNemar test, where scored by accuracy, otherwise bootstrap; Holm-adjusted, 5%)."
    ]
    lines += [f"- {_escaped(said)}." for said in report.remarks]
    lines += [f"- {name}: average accuracy {said}." for name, said in verdicts(report).items()]
    lines += [f"- Gate missed: {text}." for text in misses(report)]
    return [*lines, f"- **{advice(report)}.**"]


def _memory(row: Row) -> str:
    peak = row.footprint and row.footprint.peak_bytes
    return f"{peak / 1e6:.1f}" if peak else ""


def _percent(row: Row, task: str) -> str:
    mark = row.mark(task)
    return f"{row.accuracy[task]:.1f}" + (f" \\{mark}" if mark else "")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(name: str) -> str:
    return name.replace("_", "\\_")
