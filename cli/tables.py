"""Tables for people."""

from rich.table import Table

from epmq_deploy.runtime.report import EvalReport
from epmq_deploy.stage import Manifest


def eval_table(report: EvalReport) -> Table:
    """Accuracy per task and average, drop against fp32 merged, size and latency."""
    threads = "default" if report.threads is None else str(report.threads)
    table = Table(
        title="accuracy %, by model and task",
        caption=f"{report.provider}, {threads} threads; experts run in torch, each on its own task",
    )
    table.add_column("model")
    for task in report.samples:
        table.add_column(task, justify="right")
    for column in ("average", "drop", "MB", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        drop = report.drop(row)
        table.add_row(
            row.name,
            *(f"{row.accuracy[task]:.1f}" for task in report.samples),
            f"{row.average:.2f}",
            "" if drop is None else f"{drop:+.2f}",
            "" if row.bytes is None else f"{row.bytes / 1e6:.2f}",
            "" if row.latency is None else f"{row.latency.p50_ms:.2f}",
            "" if row.latency is None else f"{row.latency.p95_ms:.2f}",
        )
    return table


def stage_table(manifest: Manifest, folder: str) -> Table:
    """What a stage wrote."""
    table = Table(title=f"{manifest.stage}: {folder}", show_header=False)
    for key, value in manifest.details.items():
        if isinstance(value, list):
            lines = [_listed(item) for item in value]
            table.add_row(key, "\n".join(lines) or "none")
        else:
            table.add_row(key, _listed(value))
    return table


def _listed(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(item)}" for key, item in value.items())
    return f"{value:.5f}" if isinstance(value, float) else str(value)
