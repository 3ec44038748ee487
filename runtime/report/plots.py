"""Charts of a report, drawn by Vega-Lite through altair.

A chart is a specification as plain data; the page draws all of them with one copy of the library.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt

from epmq_deploy.runtime.evaluation.report import EXPERTS, REFERENCE, EvalReport, Row
from epmq_deploy.runtime.evaluation.significance import Interval

# Okabe & Ito (Color Universal Design, 2008); grey for experts.
_COLORS = ("#8a8f98", "#0072b2", "#d55e00", "#009e73", "#b8578f", "#9a7d00", "#3a9fd4", "#6a4c93")
_FIXED = (EXPERTS, REFERENCE)
_HEAT = ("#f6d9d2", "#c8402a")
_ROW = 18
_BAR = 9
_AVERAGE = "average over tasks"
_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        name: unique on the page.
        title: what is shown.
        description: what there is to see, for those who cannot see it.
        spec: Vega-Lite, as plain data.
    """

    name: str
    title: str
    description: str
    spec: Mapping[str, Any]


def color(report: EvalReport, row: Row) -> str:
    """Return a model's colour: the same on every page for experts and fp32 merged."""
    if row.name in _FIXED:
        return _COLORS[_FIXED.index(row.name)]
    others = [other for other in report.rows if other.name not in _FIXED]
    return _COLORS[2 + others.index(row) % (len(_COLORS) - 2)]


def accuracy_chart(report: EvalReport) -> Chart:
    """Return a bar with its interval per model and task, and on average over tasks."""
    values = [
        _point(row, task or _AVERAGE, percent, interval)
        for task in [*report.samples, None]
        for row in report.rows
        for percent, interval in [
            (row.average, row.average_interval)
            if task is None
            else (row.accuracy[task], row.intervals[task])
        ]
    ]
    tasks = [*report.samples, _AVERAGE]
    chosen = alt.selection_point(fields=["model"], bind="legend")
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("task:N", sort=tasks, title=None, axis=alt.Axis(labelLimit=110, tickSize=0)),
        yOffset=alt.YOffset("model:N", sort=[row.title for row in report.rows]),
        opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
        tooltip=["task:N", "model:N", alt.Tooltip("shown:N", title=report.measure)],
    )
    percents = alt.Scale(domain=[0, 100], clamp=True)
    bars = base.mark_bar().encode(
        x=alt.X("percent:Q", scale=percents, title=f"{report.measure}, %"),
        color=_model_colors(report),
    )
    whiskers = base.mark_rule(clip=True).encode(x=alt.X("low:Q", scale=percents), x2="high:Q")
    title = "Accuracy by task and model, with 95% intervals"
    height = len(tasks) * (_BAR * len(report.rows) + 12)
    averages = ", ".join(f"{row.title} {row.average:.1f}%" for row in report.rows)
    description = f"Bars from 0 to 100 percent. On average over tasks: {averages}."
    layered = alt.layer(bars, whiskers).add_params(chosen).properties(height=height)
    return _chart("accuracy", title, description, layered)


def tradeoff_chart(report: EvalReport) -> Chart:
    """Return accuracy over latency, a circle per graph with an area proportional to its file."""
    graphs = [row for row in report.rows if row.timings]
    points = [
        _point(row, _AVERAGE, row.average, row.average_interval)
        | {"milliseconds": row.timings[0].p50_ms, "megabytes": (row.bytes or 0) / 1e6}
        for row in graphs
    ]
    lines = [
        _point(row, _AVERAGE, row.average, row.average_interval)
        for row in report.rows
        if not row.timings
    ]
    tooltip = [
        "model:N",
        alt.Tooltip("shown:N", title=report.measure),
        alt.Tooltip("milliseconds:Q", title="median latency, ms", format=".2f"),
        alt.Tooltip("megabytes:Q", title="file, MB", format=".2f"),
    ]
    x = alt.X("milliseconds:Q", title="median latency, ms", scale=alt.Scale(zero=True))
    colors = _model_colors(report)
    graph_data, line_data = alt.Data(values=points), alt.Data(values=lines)
    y = alt.Y("percent:Q", title=f"average {report.measure}, %", scale=alt.Scale(zero=False))
    circles = (
        alt.Chart(graph_data)
        .mark_circle(opacity=0.7)
        .encode(
            x=x,
            y=y,
            color=colors,
            size=alt.Size("megabytes:Q", legend=None, scale=alt.Scale(rangeMin=40, rangeMax=900)),
            tooltip=tooltip,
        )
    )
    whiskers = alt.Chart(graph_data).mark_rule().encode(x=x, y="low:Q", y2="high:Q")
    experts = (
        alt.Chart(line_data)
        .mark_rule(strokeDash=[4, 3])
        .encode(y="percent:Q", color=colors, tooltip=["model:N", "shown:N"])
    )
    batch = graphs[0].timings[0].batch
    title = f"Average accuracy over latency at batch {batch}; circle area is file size"
    description = "; ".join(_told(row) for row in graphs)
    layered = alt.layer(whiskers, experts, circles).properties(height=300)
    return _chart("tradeoff", title, description, layered)


def heat_maps(
    name: str,
    title: str,
    values: Mapping[str, float],
    scale: alt.Scale,
    show: Callable[[float], str],
) -> list[Chart]:
    """Return a chart per stack of blocks; layers outside any block have one of their own.

    Args:
        name: prefix of the charts' names.
        title: what is shown.
        values: numbers by the layer's dotted name, in running order.
        scale: from numbers to colours, see ``heat_scale``.
        show: a number as text, short.
    """
    stacks: dict[str, list[dict[str, Any]]] = {}
    for layer, value in values.items():
        match = _BLOCK.match(layer)
        stack, block, kind = match.group("stack", "block", "kind") if match else ("", "", layer)
        cell = {"layer": layer, "block": block, "kind": kind, "value": value, "shown": show(value)}
        stacks.setdefault(stack, []).append(cell)
    return [
        _heat_map(
            f"{name}-{index}",
            f"{title} in {stack}" if stack else f"{title} outside the blocks",
            cells,
            scale,
        )
        for index, (stack, cells) in enumerate(stacks.items())
    ]


def heat_scale(low: float, high: float, *, logarithmic: bool = False, reverse: bool = False) -> Any:
    """Return the scale of a heat map, from light at ``low`` to dark at ``high``."""
    return alt.Scale(
        type="log" if logarithmic else "linear",
        domain=[low, high],
        range=list(_HEAT),
        clamp=True,
        reverse=reverse,
    )


def _heat_map(name: str, title: str, cells: list[dict[str, Any]], scale: alt.Scale) -> Chart:
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    blocks = list(dict.fromkeys(cell["block"] for cell in cells))
    heat = (
        alt.Chart(alt.Data(values=cells))
        .mark_rect(stroke="#8884", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "block:O",
                sort=blocks,
                title="block" if blocks != [""] else None,
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y("kind:N", sort=kinds, title=None, axis=alt.Axis(labelLimit=130)),
            color=alt.Color("value:Q", scale=scale, legend=None),
            tooltip=["layer:N", alt.Tooltip("shown:N", title="value")],
        )
        .properties(height=_ROW * len(kinds))
    )
    shown = ", ".join(f"{cell['layer']} {cell['shown']}" for cell in cells[:3])
    description = f"One column per block, one row per kind of layer. The first: {shown}."
    return _chart(name, title, description, heat)


def _model_colors(report: EvalReport) -> alt.Color:
    scale = alt.Scale(
        domain=[row.title for row in report.rows],
        range=[color(report, row) for row in report.rows],
    )
    legend = alt.Legend(orient="top", title=None, columns=2)
    return alt.Color("model:N", scale=scale, legend=legend)


def _point(row: Row, task: str, percent: float, interval: Interval) -> dict[str, Any]:
    return {
        "task": task,
        "model": row.title,
        "percent": percent,
        "low": interval.low,
        "high": interval.high,
        "shown": f"{percent:.2f}% [{interval.low:.1f}, {interval.high:.1f}]",
    }


def _told(row: Row) -> str:
    megabytes, milliseconds = (row.bytes or 0) / 1e6, row.timings[0].p50_ms
    return f"{row.title}: {row.average:.1f}%, {milliseconds:.2f} ms, {megabytes:.2f} MB"


def _chart(name: str, title: str, description: str, chart: Any) -> Chart:
    lines = alt.TitleParams(_wrapped(title))
    chart = chart.properties(width="container", title=lines, description=description)
    spec = chart.to_dict()
    # The address of the schema, which nothing here needs.
    spec.pop("$schema", None)
    return Chart(name, title, description, spec)


def _wrapped(title: str, width: int = 38) -> list[str]:
    """Return a long title as lines."""
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
