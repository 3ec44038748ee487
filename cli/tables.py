"""Tables for people."""

from rich.markup import escape
from rich.table import Table

from epmq_deploy.artifacts.manifest import Manifest
from epmq_deploy.artifacts.names import MANIFEST


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
        table.add_column(title, no_wrap=True)
    for title in ("MB", "low-bit", "off torch", "agree"):
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
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        return f"{len(value)}, see {MANIFEST}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(item)}" for key, item in value.items())
    return f"{value:.5f}" if isinstance(value, float) else str(value)
