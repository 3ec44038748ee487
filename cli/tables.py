"""Results of stages as terminal tables."""

from rich.markup import escape
from rich.table import Table

from epmq_deploy.artifacts.manifest import AnyManifest, ExportManifest
from epmq_deploy.artifacts.names import MANIFEST


def stage_table(manifest: AnyManifest, folder: str) -> Table:
    """Return a table of what a stage reports, one line per entry of its manifest."""
    table = Table(title=escape(f"{manifest.stage}: {folder}"), show_header=False)
    for key, value in manifest.reported.items():
        items = value if isinstance(value, list) else [value]
        table.add_row(key, escape("\n".join(map(_text, items))) or "none")
    return table


def export_table(manifest: ExportManifest, folder: str) -> Table:
    """Return a table of the graphs an export wrote."""
    table = Table(title=escape(f"export: {folder}"))
    for title in ("format", "file"):
        table.add_column(title, no_wrap=True)
    for title in ("MB", "low-bit", "off torch", "agree"):
        table.add_column(title, justify="right")
    for graph in manifest.graphs:
        agreement = graph.parity.agreement
        table.add_row(
            graph.format,
            escape(graph.file),
            f"{graph.bytes / 1e6:.2f}",
            str(graph.low_bit_nodes),
            f"{graph.parity.relative:.1e}",
            "" if agreement is None else f"{agreement:.1%}",
        )
    return table


def _text(value: object) -> str:
    """Return one value of a manifest as text; of several mappings only their number."""
    if isinstance(value, dict | list) and value:
        several = value.values() if isinstance(value, dict) else value
        if all(isinstance(item, dict) for item in several):
            return f"{len(value)}, see {MANIFEST}"
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item not in ("", [], {})}
        return ", ".join(f"{key} {_text(item)}" for key, item in given.items())
    return f"{value:.5f}" if isinstance(value, float) else str(value)
