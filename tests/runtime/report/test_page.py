"""The evaluation's page, as text and in a real browser."""

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from browser import at_end, look_at
from eval_report import KINDS, MODELS, TASKS, build_report

from epmq_deploy.runtime.evaluation.report import Gates
from epmq_deploy.runtime.evaluation.significance import Interval
from epmq_deploy.runtime.report.page import html_page
from epmq_deploy.runtime.report.plots import color

BLOCKS = 24
MANY_TASKS = {f"a_task_with_a_rather_long_name_{index}": 200 for index in range(12)} | TASKS
PAGE = html_page(build_report(MANY_TASKS, BLOCKS))


CONTENT = re.sub(r"<script>.*?</script>", "", PAGE, flags=re.DOTALL)


def specs_of(page: str) -> Any:
    """The page's charts by name, as Vega-Lite reads them."""
    (content,) = re.findall(r'<script id="charts"[^>]*>(.*?)</script>', page, re.DOTALL)
    return json.loads(content)


def test_charts_are_described() -> None:
    specs = specs_of(PAGE)
    assert len(specs) == 6
    for name, spec in specs.items():
        (label,) = re.findall(rf'id="{name}" role="img" aria-label="(.*?)"', PAGE)
        title = " ".join(spec["title"]["text"])
        assert min(len(title), len(spec["description"])) > 10
        assert unescape(label) == f"{title}. {spec['description']}"


def test_the_page_needs_nothing_but_itself() -> None:
    assert PAGE.count("<script") == 2
    assert not re.search(r"url\(|@import|https?:|src=", CONTENT)


def test_names_from_data_are_escaped() -> None:
    report = build_report({"<b>&": 10})
    page = html_page(report)
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert {row["task"] for row in specs_of(page)["accuracy"]["data"]["values"]} == {
        "<b>&",
        "average over tasks",
    }
    HTMLParser().feed(page)


def test_models_have_the_same_colours_whichever_others_there_are() -> None:
    report = build_report()
    alone = replace(report, rows=report.rows[1:])
    assert len({color(report, row) for row in report.rows}) == len(MODELS)
    assert color(alone, report.row("fp32")) == color(report, report.row("fp32"))


def test_the_page_says_what_to_deploy_and_what_missed_a_gate() -> None:
    assert "deploy onnx/model_equal.onnx" in PAGE
    missed = html_page(replace(build_report(), gates=Gates(max_size=1)))
    assert missed.count("Gate missed") == 4
    assert "no low-bit graph to deploy" in missed


def test_scores_below_zero_stay_in_the_picture() -> None:
    """Rank correlations may be negative; numbers say how far."""
    report = build_report()
    rows = [
        replace(row, accuracy=row.accuracy | {"cars": -20.0}, intervals=row.intervals | seen)
        for row, seen in zip(
            report.rows,
            ({"cars": Interval(low, high)} for low in (-60, -30) for high in (-5, 0, 40)),
            strict=True,
        )
    ]
    spec = specs_of(html_page(replace(report, rows=tuple(rows))))["accuracy"]
    shown = {row["shown"] for row in spec["data"]["values"]}
    assert "-20.00% [-60.0, -5.0]" in shown
    for layer in spec["layer"]:
        assert layer["encoding"]["x"]["scale"] == {"clamp": True, "domain": [0, 100]}


def test_tables_name_what_percentages_and_tests_are() -> None:
    report = build_report()
    scored = html_page(replace(report, metrics={"cars": "Another one"}))
    assert ">accuracy, %<" in html_page(report)
    assert ">accuracy or score, %<" in scored
    assert ">p<" in scored
    assert "McNemar" not in scored


@pytest.fixture(scope="module", params=[360, 1000])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found, console = look_at(PAGE, tmp_path_factory.mktemp("browser"), request.param)
    assert console == []
    return found | {"width": request.param}


def overlaps(first: dict[str, float], second: dict[str, float]) -> bool:
    """Whether two boxes share more than a hair."""
    width = min(first["right"], second["right"]) - max(first["left"], second["left"])
    height = min(first["bottom"], second["bottom"]) - max(first["top"], second["top"])
    return width > 0.5 and height > 0.5


def test_plots_are_there_with_all_their_marks(seen: Any) -> None:
    marks = {}
    for picture in seen["pictures"]:
        shapes = picture["shapes"]
        assert all(s["right"] > s["left"] and s["bottom"] > s["top"] for s in shapes)
        marks[picture["id"]] = [shape["kind"] for shape in shapes]
    assert marks == {
        "accuracy": ["rect"] * (len(MANY_TASKS) + 1) * len(MODELS),
        "tradeoff": ["symbol"] * (len(MODELS) - 1),
        "noise-0-0": ["rect"],
        "noise-0-1": ["rect"] * BLOCKS * len(KINDS),
        "quantization-0": ["rect"],
        "quantization-1": ["rect"] * BLOCKS * len(KINDS),
    }


def test_labels_neither_overlap_nor_leave_their_picture(seen: Any) -> None:
    for picture in seen["pictures"]:
        texts, frame = picture["texts"], picture["box"]
        assert texts
        for text in texts:
            assert frame["left"] - 1 <= text["left"] and text["right"] <= frame["right"] + 1, text
            assert frame["top"] - 1 <= text["top"] and text["bottom"] <= frame["bottom"] + 1, text
        crossing = [(a["text"], b["text"]) for a, b in combinations(texts, 2) if overlaps(a, b)]
        assert crossing == [], picture["id"]


def test_the_page_is_as_wide_as_the_screen(seen: Any) -> None:
    assert seen["scrolls"] <= seen["width"]
    assert all(picture["box"]["right"] <= seen["width"] for picture in seen["pictures"])


def test_bars_are_as_long_as_accuracies(seen: Any) -> None:
    bars = next(item for item in seen["pictures"] if item["id"] == "accuracy")["shapes"]
    lengths = [bar["right"] - bar["left"] for bar in bars[: len(MODELS)]]
    shares = [share for share, _, _ in MODELS.values()]
    for length, share in zip(lengths, shares, strict=True):
        assert length / lengths[0] == pytest.approx(share / shares[0], rel=0.01)


def test_the_browser_does_report_errors(tmp_path: Path) -> None:
    """The checks above could not fail otherwise."""
    page = at_end(PAGE, '<script>console.error("broken")</script>')
    _, console = look_at(page, tmp_path)
    assert any("broken" in line for line in console)


def test_dark_where_the_reader_wants_it(tmp_path: Path, seen: Any) -> None:
    dark, _ = look_at(PAGE, tmp_path, 1000, "--blink-settings=preferredColorScheme=0")
    assert seen["background"] == "rgb(255, 255, 255)"
    assert dark["background"] == "rgb(22, 23, 27)"
