"""Tables for people."""

from rich.markup import escape
from rich.table import Table

from epmq_deploy.stage import Manifest


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


def _listed(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(item)}" for key, item in value.items())
    return f"{value:.5f}" if isinstance(value, float) else str(value)
