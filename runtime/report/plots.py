"""Plots of a report as SVG: accuracies by task and model, and accuracy against speed and size."""

import math
from collections.abc import Callable, Sequence

from epmq_deploy.runtime.evaluation.report import EXPERTS, REFERENCE, EvalReport, Row
from epmq_deploy.runtime.evaluation.significance import Interval
from epmq_deploy.runtime.report.markup import Markup, element, figure

# In units of the drawing, which the page shows at about their size.
WIDTH = 380.0
_BAR, _GAP, _HEAD, _GROUP = 10.0, 4.0, 17.0, 8.0
_VALUES = 38.0
_LABEL = 14.0
_MARGIN = 138.0
_AXIS = 40.0

Scale = Callable[[float], float]


def color(report: EvalReport, row: Row) -> str:
    """CSS class of a model's colour: the same on every page for experts and fp32 merged."""
    fixed = (EXPERTS, REFERENCE)
    if row.name in fixed:
        return f"m{fixed.index(row.name)}"
    others = [other for other in report.rows if other.name not in fixed]
    return f"m{2 + others.index(row) % 6}"


def accuracy_plot(report: EvalReport) -> Markup:
    """A bar with its interval per model and task, and on average over tasks."""
    scale = (WIDTH - _VALUES) / 100
    shapes: list[Markup] = []
    y = 0.0
    for task in [*report.samples, None]:
        y += _HEAD
        label = "average over tasks" if task is None else task
        shapes.append(element("text", label, x=0, y=y - 5, class_="strong"))
        for row in report.rows:
            percent = row.average if task is None else row.accuracy[task]
            interval = row.average_interval if task is None else row.intervals[task]
            shapes += _bar(f"{row.title}, {label}", percent, interval, y, scale, color(report, row))
            y += _BAR + _GAP
        y += _GROUP
    models = ", ".join(f"{row.title} {row.average:.1f}%" for row in report.rows)
    return figure(
        "accuracy",
        "Accuracy by task and model, with 95% intervals",
        f"Bars from 0 to 100 percent. On average over tasks: {models}.",
        WIDTH,
        y - _GROUP,
        *shapes,
    )


def _bar(
    label: str, percent: float, interval: Interval, y: float, scale: float, class_: str
) -> list[Markup]:
    # Rank correlations may be negative; bars start at 0.
    low, high = (max(end, 0) * scale for end in (interval.low, interval.high))
    middle = y + _BAR / 2
    shown = f"{label}: {percent:.2f}% [{interval.low:.1f}, {interval.high:.1f}]"
    bar = element(
        "rect",
        element("title", shown),
        class_=f"bar {class_}",
        x=0,
        y=y,
        # Zero percent and less are seen as well.
        width=max(percent * scale, 1),
        height=_BAR,
    )
    whisker = Markup(f"M{low:.2f} {middle:.2f}H{high:.2f}") + "".join(
        f"M{end:.2f} {middle - 2.5:.2f}v5" for end in (low, high)
    )
    value = element("text", f"{percent:.1f}", class_="end", x=WIDTH, y=y + _BAR - 1)
    return [bar, element("path", d=whisker, class_="whisker"), value]


def tradeoff_plot(report: EvalReport) -> Markup:
    """Accuracy over latency, a circle per graph with an area proportional to its file."""
    graphs = [row for row in report.rows if row.timings]
    height = max(230.0, _LABEL * (len(report.rows) + 2))
    bottom, right = height - 34, WIDTH - _MARGIN
    slowest = max(row.timings[0].p50_ms for row in graphs)
    largest = max(row.bytes or 1 for row in graphs)
    low, high = _nice_range([row.average_interval for row in report.rows])

    def across(milliseconds: float) -> float:
        return _AXIS + (right - _AXIS - 14) * milliseconds / slowest

    def down(percent: float) -> float:
        return bottom - (bottom - 12) * (percent - low) / (high - low)

    shapes = _axes(low, high, slowest, across, down, bottom, right)
    ordered = sorted(report.rows, key=lambda row: -row.average)
    heights = _spread([down(row.average) for row in ordered], 10, height - 6)
    for row, label_y in zip(ordered, heights, strict=True):
        class_, y = color(report, row), down(row.average)
        x = across(row.timings[0].p50_ms) if row.timings else _AXIS
        leader = f"M{x:.2f} {y:.2f}H{right:.2f}L{right + 12:.2f} {label_y:.2f}"
        dashed = "leader" if row.timings else "leader dashed"
        shapes.append(element("path", d=leader, class_=f"{dashed} {class_}"))
        if row.timings:
            ends = f"M{x:.2f} {down(row.average_interval.low):.2f}"
            ends += f"V{down(row.average_interval.high):.2f}"
            shapes.append(element("path", d=ends, class_="whisker"))
            radius = max(3.0, 14 * math.sqrt((row.bytes or 0) / largest))
            shapes.append(_circle(row, x, y, radius, class_))
        label = f"{row.title} {row.average:.1f}%"
        shapes.append(element("text", label, x=right + 15, y=label_y + 3.5))
    batch = graphs[0].timings[0].batch
    said = "; ".join(_told(row) for row in graphs)
    return figure(
        "tradeoff",
        f"Average accuracy over latency at batch {batch}; the area of a circle is the file's size",
        said,
        WIDTH,
        height,
        *shapes,
    )


def _circle(row: Row, x: float, y: float, radius: float, class_: str) -> Markup:
    return element(
        "circle", element("title", _told(row)), class_=f"dot {class_}", cx=x, cy=y, r=radius
    )


def _told(row: Row) -> str:
    megabytes, milliseconds = (row.bytes or 0) / 1e6, row.timings[0].p50_ms
    return f"{row.title}: {row.average:.1f}%, {milliseconds:.2f} ms, {megabytes:.2f} MB"


def _axes(
    low: float,
    high: float,
    slowest: float,
    across: Scale,
    down: Scale,
    bottom: float,
    right: float,
) -> list[Markup]:
    shapes = []
    for percent in _ticks(low, high):
        y = down(percent)
        shapes.append(element("path", d=f"M{_AXIS:g} {y:.2f}H{right:.2f}", class_="grid"))
        shapes.append(element("text", f"{percent:g}%", class_="end", x=_AXIS - 4, y=y + 3.5))
    for milliseconds in _ticks(0, slowest):
        x = across(milliseconds)
        shapes.append(element("path", d=f"M{x:.2f} {bottom:.2f}v4", class_="whisker"))
        shapes.append(element("text", f"{milliseconds:g}", class_="middle", x=x, y=bottom + 15))
    shapes.append(
        element("text", "median latency, ms", class_="middle", x=(_AXIS + right) / 2, y=bottom + 29)
    )
    return shapes


def _nice_range(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Whole tens around all intervals."""
    low = 10 * math.floor(min(item.low for item in intervals) / 10)
    high = 10 * math.ceil(max(item.high for item in intervals) / 10)
    return float(low), float(max(high, low + 10))


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from ``low`` to ``high``."""
    span = high - low
    unit = 10 ** math.floor(math.log10(span))
    step = next(unit * part for part in (0.2, 0.25, 0.5, 1, 2) if span / (unit * part) <= 5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Positions near the ascending ``wanted`` ones, a label's height apart, within bounds."""
    placed: list[float] = []
    for position in wanted:
        placed.append(max(position, low, placed[-1] + _LABEL if placed else low))
    ceiling = high
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - _LABEL
    return placed
