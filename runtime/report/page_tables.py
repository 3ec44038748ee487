"""Tables of the evaluation's page."""

from collections.abc import Iterable, Sequence

from epmq_deploy.quantization.results import LayerReport
from epmq_deploy.runtime.evaluation.diagnosis import Diagnosis
from epmq_deploy.runtime.evaluation.report import EvalReport
from epmq_deploy.runtime.report.markdown import cost_lines
from epmq_deploy.runtime.report.markup import Markup, element


def accuracy_table(report: EvalReport) -> Markup:
    """Per task and model: percent, interval and, against fp32 merged, verdict, p and agreement."""
    rows = []
    for task in [*report.samples, None]:
        for row in report.rows:
            percent = row.average if task is None else row.accuracy[task]
            interval = row.average_interval if task is None else row.intervals[task]
            found = row.against_average if task is None else row.against.get(task)
            against = ["", "", "", ""]
            if found is not None:
                p_value = "" if found.p_value is None else f"{found.p_value:.3g}"
                points = (
                    f"{found.points:+.2f} [{found.interval.low:.1f}, {found.interval.high:.1f}]"
                )
                against = [points, found.verdict, p_value, f"{found.agreement:.1f}"]
            shown = f"{percent:.2f} [{interval.low:.1f}, {interval.high:.1f}]"
            rows.append([task or "average", row.title, shown, *against])
    measure = f"{report.measure}, %"
    titles = ["task", "model", measure, "points gained", "verdict", "p", "agrees, %"]
    return _table(f"{report.measure.capitalize()} of every model on every task", titles, rows)


def cost_table(report: EvalReport) -> Markup:
    """Size, load time, memory and latencies of every graph."""
    graphs = [row for row in report.rows if row.timings]
    skip = len(report.rows) - len(graphs)
    rows = [[label, *cells[skip:]] for label, cells in cost_lines(report)]
    return _table("What each graph costs", ["", *(row.title for row in graphs)], rows)


def noise_table(diagnosis: Diagnosis) -> Markup:
    """Layers of one graph against fp32 merged, the worst first."""
    rows = [
        [noise.layer, f"{noise.own_db:.1f}", f"{noise.output_db:.1f}"]
        for noise in diagnosis.worst_first
    ]
    titles = ["layer", "own", "with earlier layers'"]
    return _table("Signal-to-noise ratio of each layer, dB", titles, rows)


def layer_table(layers: Iterable[LayerReport]) -> Markup:
    """How each layer fared in quantization."""
    rows = [
        [
            layer.layer,
            layer.status,
            str(layer.bits or ""),
            str(layer.group_size or ""),
            f"{layer.error_before:.2e}" if layer.bits else "",
            f"{layer.error_after:.2e}" if layer.bits else "",
            layer.reason,
        ]
        for layer in layers
    ]
    titles = ["layer", "status", "bits", "group", "rounded", "solved", "why"]
    return _table("Layers in quantization, with relative errors", titles, rows)


def _table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = (
        element(
            "tr",
            element("th", cells[0], scope="row"),
            *(element("td", cell) for cell in cells[1:]),
        )
        for cells in rows
    )
    table = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
    )
    # Wide tables scroll by themselves, also by keyboard.
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)
