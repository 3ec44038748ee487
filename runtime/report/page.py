"""The evaluation as one HTML page that needs nothing but itself."""

import math
from collections.abc import Iterator

from epmq_deploy.runtime.evaluation.gates import advice, misses, verdicts
from epmq_deploy.runtime.evaluation.report import EvalReport
from epmq_deploy.runtime.report.heatmap import heat_maps
from epmq_deploy.runtime.report.markup import Markup, element
from epmq_deploy.runtime.report.page_style import STYLE
from epmq_deploy.runtime.report.page_tables import (
    accuracy_table,
    cost_table,
    layer_table,
    noise_table,
)
from epmq_deploy.runtime.report.plots import accuracy_plot, color, tradeoff_plot
from epmq_deploy.version import __version__

# Signal-to-noise ratios between which the colour of a heat map changes, in decibels.
_CLEAN_DB, _NOISY_DB = 40.0, 0.0
# Relative errors likewise.
_SMALL_ERROR, _LARGE_ERROR = 1e-4, 1e-1


def html_page(report: EvalReport) -> str:
    """The whole page: what to deploy, plots, tables, layers."""
    title = "Evaluation of a merged, quantized model"
    body = element(
        "main",
        element("h1", title),
        *_summary(report),
        element("h2", "Accuracy"),
        _legend(report),
        accuracy_plot(report),
        _details("All accuracies", accuracy_table(report)),
        element("h2", "Accuracy, latency and size"),
        tradeoff_plot(report),
        cost_table(report),
        *_diagnosis(report),
        *_quantization(report),
        element("footer", f"epmq-deploy {__version__}, evaluation {report.fingerprint[:12]}"),
    )
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', body), lang='en')}\n"


def _summary(report: EvalReport) -> Iterator[Markup]:
    yield element("p", advice(report), class_="verdict", role="note")
    found = [
        element("li", element("b", name), f" is {said}.") for name, said in verdicts(report).items()
    ]
    missed = [element("li", f"Gate missed: {text}.", class_="missed") for text in misses(report)]
    yield element("ul", *found, *missed)
    samples = sum(report.samples.values())
    yield element(
        "p",
        f"{len(report.samples)} tasks, {samples} samples, {report.provider}. Brackets and whiskers "
        f"are 95% intervals; “no worse” means that a loss of more than {report.margin:g} points is "
        "ruled out. Experts run in torch, each on its own task.",
        class_="note",
    )
    for said in report.other_metrics:
        yield element("p", f"{said}.", class_="note")


def _legend(report: EvalReport) -> Markup:
    items = (
        element("li", element("span", class_=f"swatch {color(report, row)}"), row.title)
        for row in report.rows
    )
    return element("ul", *items, class_="legend", aria_label="Colours of the models")


def _diagnosis(report: EvalReport) -> Iterator[Markup]:
    for index, (name, found) in enumerate(report.diagnoses.items()):
        yield element("h2", f"Layers of {name} against fp32 merged")
        blamed = ", ".join(found.blamed)
        yield element(
            "p",
            f"Standing out with twice the typical layer's own error: {blamed}."
            if blamed
            else "No layer stands out with twice the typical layer's own error.",
        )
        yield element(
            "p",
            f"Signal-to-noise ratio in dB of what each layer makes of its inputs ({found.samples} "
            "samples); the darker, the noisier. Methods that move layers towards the experts show "
            "as noise, too.",
            class_="note",
        )
        if found.missing:
            yield element("p", f"Not compared: {', '.join(found.missing)}.", class_="note")
        values = {noise.layer: noise.own_db for noise in found.layers}
        yield from heat_maps(
            f"noise-{index}",
            f"Signal-to-noise ratio by layer of {name}, dB",
            values,
            lambda value: (_CLEAN_DB - value) / (_CLEAN_DB - _NOISY_DB),
            lambda value: f"{value:.0f}",
        )
        yield _details("All layers, the worst first", noise_table(found))


def _quantization(report: EvalReport) -> Iterator[Markup]:
    if not report.layers:
        return
    errors = {layer.layer: layer.error_after for layer in report.layers if layer.bits}
    yield element("h2", "Layers in quantization")
    yield element(
        "p",
        "Error relative to each layer's target, in percent; the darker, the larger (logarithmic).",
        class_="note",
    )
    span = math.log(_LARGE_ERROR / _SMALL_ERROR)
    if errors:
        yield from heat_maps(
            "quantization",
            "Relative error by layer in quantization, percent",
            errors,
            lambda value: math.log(max(value, _SMALL_ERROR) / _SMALL_ERROR) / span,
            lambda value: f"{100 * value:.2g}",
        )
    yield _details("All layers", layer_table(report.layers))


def _details(label: str, content: Markup) -> Markup:
    return element("details", element("summary", label), content)
