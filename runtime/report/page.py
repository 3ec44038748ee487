"""The evaluation as one self-contained HTML page."""

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from epmq_deploy.runtime.evaluation.gates import advice, misses, verdicts
from epmq_deploy.runtime.evaluation.report import EvalReport
from epmq_deploy.runtime.report.plots import (
    Chart,
    accuracy_chart,
    heat_maps,
    heat_scale,
    tradeoff_chart,
)
from epmq_deploy.runtime.report.tables import (
    accuracy_table,
    class_table,
    cost_table,
    layer_table,
    metric_table,
    noise_table,
)
from epmq_deploy.version import __version__

# Signal-to-noise ratios between which the colour of a heat map changes, in decibels.
_CLEAN_DB, _NOISY_DB = 40.0, 0.0
# Relative errors likewise.
_SMALL_ERROR, _LARGE_ERROR = 1e-4, 1e-1


def html_page(report: EvalReport) -> str:
    """Return the whole page: what to deploy, charts, tables, layers."""
    accuracy, tradeoff = accuracy_chart(report), tradeoff_chart(report)
    layers = _layer_charts(report)
    diagnoses = list(_diagnoses(report))
    charts = [accuracy, tradeoff, *layers]
    charts += [chart for diagnosis in diagnoses for chart in diagnosis["charts"]]
    return _template().render(
        title="Evaluation of a merged, quantized model",
        # Our own files and the library's, which are not data.
        style=Markup(_text("style.css")),
        library=Markup(_library()),
        advice=advice(report),
        verdicts=verdicts(report),
        misses=misses(report),
        tasks=len(report.samples),
        samples=sum(report.samples.values()),
        provider=report.provider,
        margin=f"{report.margin:g}",
        remarks=report.remarks,
        charts={"accuracy": accuracy, "tradeoff": tradeoff, "layers": layers},
        specs={chart.name: chart.spec for chart in charts},
        accuracy_table=accuracy_table(report),
        metric_table=metric_table(report),
        class_table=class_table(report),
        cost_table=cost_table(report),
        diagnoses=diagnoses,
        layer_table=layer_table(report.layers) if report.layers else None,
        version=__version__,
        fingerprint=report.fingerprint[:12],
    )


def _diagnoses(report: EvalReport) -> Iterator[dict[str, Any]]:
    for index, (name, diagnosis) in enumerate(report.diagnoses.items()):
        yield {
            "name": name,
            "blamed": ", ".join(diagnosis.blamed),
            "samples": diagnosis.samples,
            "missing": ", ".join(diagnosis.missing),
            "charts": heat_maps(
                f"noise-{index}",
                f"Signal-to-noise ratio by layer of {name}, dB",
                {noise.layer: noise.own_db for noise in diagnosis.layers},
                heat_scale(_NOISY_DB, _CLEAN_DB, reverse=True),
                lambda value: f"{value:.0f} dB",
            ),
            "table": noise_table(diagnosis),
        }


def _layer_charts(report: EvalReport) -> list[Chart]:
    errors = {layer.layer: layer.error_after for layer in report.layers if layer.bits}
    return heat_maps(
        "quantization",
        "Relative error by layer in quantization, percent",
        errors,
        heat_scale(_SMALL_ERROR, _LARGE_ERROR, logarithmic=True),
        lambda value: f"{100 * value:.2g}%",
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_text("report.html.j2"))


@cache
def _library() -> str:
    """Return Vega-Lite with what draws the charts, as one script; bundling takes some seconds."""
    from vl_convert import javascript_bundle

    script: str = javascript_bundle(_text("draw.js"))
    # A closing tag inside the script would end it.
    return script.replace("</script", "<\\/script")


def _text(name: str) -> str:
    return (files("epmq_deploy.runtime.report") / "templates" / name).read_text(encoding="utf-8")
