"""What ``--list`` prints: methods, formats and deployment targets, from their registries."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from epmq_deploy.options import Options
from epmq_deploy.registry import Method


def methods_data(
    methods: Mapping[str, Method],
    shared: type[Options],
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return methods and their options as plain data.

    Args:
        methods: by name.
        shared: the options of every method, which are left out.
        sources: where each method is published; None leaves this out.
    """
    return {
        "methods": [
            {
                "name": name,
                "summary": method.summary,
                **({} if sources is None else {"source": sources[name]}),
                "options": {
                    option: {"default": field.default, "description": field.description}
                    for option, field in method.options.model_fields.items()
                    if option not in shared.model_fields
                },
            }
            for name, method in methods.items()
        ]
    }


def methods_table(title: str, data: Mapping[str, Any]) -> Table:
    """Return what ``methods_data`` returned as a table, one method per line."""
    table = Table(title=title, caption="--json lists their options, --help explains them")
    columns = {"name": "name", "summary": "what it does"}
    if all("source" in method for method in data["methods"]):
        columns["source"] = "source"
    for key, heading in columns.items():
        table.add_column(heading, no_wrap=key == "name")
    for method in data["methods"]:
        table.add_row(*(escape(method[key]) for key in columns))
    return table


def formats_data() -> dict[str, Any]:
    """Return formats and deployment targets as plain data."""
    from epmq_deploy.exporters.formats import FORMATS
    from epmq_deploy.exporters.targets import TARGETS

    formats = [
        {
            "name": item.name,
            "file": f"model{item.suffix}.onnx",
            "low_bit": item.low_bit,
            "default": item.default,
            "summary": item.summary,
        }
        for item in FORMATS.values()
    ]
    targets = [
        {
            "name": item.name,
            "formats": list(item.formats),
            "why": item.why,
            "unverified": item.unverified,
        }
        for item in TARGETS.values()
    ]
    return {"formats": formats, "targets": targets}


def formats_tables(data: Mapping[str, Any]) -> Group:
    """Return what ``formats_data`` returned as two tables."""
    formats = Table(
        title="formats", caption="--formats writes these; * if neither it nor --target is given"
    )
    for heading in ("name", "default", "file", "weights", "what it is"):
        formats.add_column(heading, no_wrap=heading in ("name", "file"))
    for item in data["formats"]:
        weights = "low-bit" if item["low_bit"] else "float"
        default = "*" if item["default"] else ""
        row = (item["name"], default, item["file"], weights, item["summary"])
        formats.add_row(*map(escape, row))
    targets = Table(
        title="deployment targets", caption="--target writes the formats of a target, best first"
    )
    for heading in ("name", "formats", "why"):
        targets.add_column(heading, no_wrap=heading == "name")
    for item in data["targets"]:
        targets.add_row(*map(escape, (item["name"], ", ".join(item["formats"]), item["why"])))
    return Group(formats, targets)
