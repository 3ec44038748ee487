"""Tables for people."""

from rich.markup import escape
from rich.table import Table

from epmq_deploy.runtime.report import REFERENCE, EvalReport
from epmq_deploy.stage import Manifest


def eval_table(report: EvalReport) -> Table:
    """A column per model: accuracy per task and on average, drop, size and latency."""
    threads = "default" if report.threads is None else str(report.threads)
    table = Table(
        title="accuracy %",
        caption=f"graphs on {report.provider}, threads: {threads}; experts in torch, each on its "
        "own task",
    )
    table.add_column("task")
    for row in report.rows:
        title = "fp32 merged" if row.name == REFERENCE else row.name
        table.add_column(title, justify="right", no_wrap=True)
    for task in report.samples:
        table.add_row(task, *(f"{row.accuracy[task]:.1f}" for row in report.rows))
    table.add_section()
    table.add_row("average", *(f"{row.average:.2f}" for row in report.rows))
    drops = [report.drop(row) for row in report.rows]
    table.add_row("drop against fp32 merged", *("" if d is None else f"{d:.2f}" for d in drops))
    table.add_section()
    sizes = ["" if row.bytes is None else f"{row.bytes / 1e6:.2f}" for row in report.rows]
    table.add_row("file, MB", *sizes)
    for label, name in (("batch 1 p50, ms", "p50_ms"), ("batch 1 p95, ms", "p95_ms")):
        times = [row.latency and f"{getattr(row.latency, name):.2f}" for row in report.rows]
        table.add_row(label, *(text or "" for text in times))
    return table


def stage_table(manifest: Manifest, folder: str) -> Table:
    """What a stage wrote."""
    table = Table(title=escape(f"{manifest.stage}: {folder}"), show_header=False)
    for key, value in manifest.details.items():
        if isinstance(value, list):
            lines = [_listed(item) for item in value]
            table.add_row(key, escape("\n".join(lines)) or "none")
        else:
            table.add_row(key, escape(_listed(value)))
    return table


def export_table(manifest: Manifest, folder: str) -> Table:
    """The graphs an export wrote."""
    table = Table(title=escape(f"export: {folder}"))
    for title in ("format", "file"):
        table.add_column(title)
    for title in ("MB", "low-bit layers", "from torch", "same answer"):
        table.add_column(title, justify="right")
    for graph in manifest.details["graphs"]:
        size, layers = f"{graph['bytes'] / 1e6:.2f}", str(graph["low_bit_nodes"])
        parity = graph["parity"]
        agreement = parity["agreement"]
        same = "" if agreement is None else f"{agreement:.1%}"
        distance = f"{parity['relative']:.1e}"
        table.add_row(graph["format"], escape(graph["file"]), size, layers, distance, same)
    return table


def _listed(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(item)}" for key, item in value.items())
    return f"{value:.5f}" if isinstance(value, float) else str(value)
