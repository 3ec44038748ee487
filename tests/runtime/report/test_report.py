"""The evaluation report: numbers, gates, recommendation, JSON and Markdown."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_report import build_report, predictions
from rich.console import Console

from epmq_deploy.cli.eval_table import eval_table
from epmq_deploy.errors import GateError, RecipeError
from epmq_deploy.runtime.evaluation.evaluate import row_of
from epmq_deploy.runtime.evaluation.gates import check_gates, misses, recommend
from epmq_deploy.runtime.evaluation.predictions import TaskPredictions
from epmq_deploy.runtime.evaluation.report import Gates, Row
from epmq_deploy.runtime.evaluation.significance import Interval
from epmq_deploy.runtime.report.json_report import read_report, report_dict
from epmq_deploy.runtime.report.markdown import markdown_table
from epmq_deploy.runtime.report.page import html_page

REPORT = build_report()


def test_drop_is_in_points_of_the_average_over_tasks() -> None:
    drops = {row.name: REPORT.drop(row) for row in REPORT.rows}
    assert drops.pop("experts") is None
    expected = {"fp32": 0, "better": -10, "faster": 0, "equal": 0, "worse": 20}
    assert drops == pytest.approx(expected)


def test_rows_say_how_they_compare_with_fp32() -> None:
    verdicts = {row.name: row.against_average.verdict for row in REPORT.candidates if row.against}
    expected = {"better": "better", "faster": "no worse", "equal": "no worse", "worse": "worse"}
    assert verdicts == expected
    assert not REPORT.row("fp32").against
    assert not REPORT.row("experts").against
    worse = REPORT.row("worse").against["cars"]
    assert (worse.points, worse.agreement) == (pytest.approx(-20), pytest.approx(80))


def test_predictions_may_be_texts() -> None:
    truth = np.array(["yes", "no", "maybe"])
    predicted = {"fp32": np.array(["yes", "no", "no"]), "low": np.array(["yes", "yes", "no"])}
    row = row_of("low", {"a": TaskPredictions(truth, predicted)}, 1.0)
    assert row.accuracy["a"] == pytest.approx(100 / 3)
    assert row.against["a"].agreement == pytest.approx(200 / 3)


def test_other_metrics_than_accuracy_are_named() -> None:
    report = replace(REPORT, metrics={"cars": "", "traffic_signs": "Another one"})
    assert "- traffic\\_signs: Another one.\n" in markdown_table(report)
    assert "traffic_signs: Another one." in html_page(report)
    assert "cars: " not in markdown_table(report)
    assert json.loads(json.dumps(report_dict(report)))["metrics"] == report.metrics


def test_all_missed_gates_come_in_one_message() -> None:
    check_gates(REPORT)
    check_gates(replace(REPORT, gates=Gates(max_drop=20, max_latency_ratio=0.9, max_size=61)))
    with pytest.raises(GateError) as caught:
        check_gates(replace(REPORT, gates=Gates(19.9, 0.5, 58)))
    message = str(caught.value)
    assert "worse lost 20.00 points (95% interval 16.9" in message
    assert "better takes 0.90 of fp32 merged's time, allowed 0.5" in message
    assert "faster takes 61.00 MB, allowed 58" in message
    assert message.count("allowed") == 5


def test_one_graph_that_meets_all_gates_is_enough() -> None:
    """It is recommended, and what the others missed is said."""
    report = replace(REPORT, gates=Gates(19.9, 0.5, 60.5))
    check_gates(report)
    chosen = recommend(report)
    assert chosen is not None
    assert chosen.format == "equal"
    missed = ["better takes 0.90 of", "faster takes 61.00 MB", "worse lost"]
    assert [text for text in misses(report) if not text.startswith(tuple(missed))] == []
    console = Console(width=200)
    with console.capture() as captured:
        console.print(eval_table(report))
    for shown in (markdown_table(report), html_page(report), captured.get()):
        for text in missed:
            assert f"gate missed: {text}" in shown.replace("Gate", "gate")


def test_references_are_not_held_against_gates() -> None:
    strict = replace(REPORT, gates=Gates(max_drop=-100, max_size=1))
    assert not any(text.startswith(("fp32", "experts")) for text in misses(strict))
    assert len(misses(strict)) == 2 * len(REPORT.candidates)


def test_a_drop_of_exactly_the_allowed_size_passes() -> None:
    fp32 = row_of("fp32", predictions(), 1.0, bytes=1)
    fp32 = replace(fp32, accuracy={"a": 0.1, "b": 0.2})
    low = replace(REPORT.row("worse"), accuracy={"a": -0.9, "b": -0.8})
    assert not misses(replace(REPORT, rows=(fp32, low), gates=Gates(max_drop=1.0)))


@pytest.mark.parametrize(
    ("gates", "format_", "reason"),
    [
        (Gates(max_drop=20), "worse", "the fastest"),
        # Without a gate nothing that is significantly worse.
        (Gates(), "equal", "the smallest of those equally fast"),
        # 0.30 and 0.31 are the same speed; the smaller one counts.
        (Gates(max_drop=1), "equal", "the smallest of those equally fast"),
        (Gates(max_drop=-5), "better", "the only one that qualifies"),
    ],
)
def test_recommends_the_fastest_that_meets_the_gates(
    gates: Gates, format_: str, reason: str
) -> None:
    found = recommend(replace(REPORT, gates=gates))
    assert found is not None
    assert (found.format, found.files) == (format_, (f"onnx/model_{format_}.onnx",))
    assert reason in found.reason
    assert ("meets the gates" in found.reason) == (gates != Gates())


def timed(name: str, ratio: float, interval: Interval | None) -> Row:
    """A row of the report with another latency."""
    row = REPORT.row(name)
    timings = [replace(item, ratio=ratio, ratio_interval=interval) for item in row.timings]
    return replace(row, timings=tuple(timings))


@pytest.mark.parametrize(
    ("intervals", "format_"),
    [
        # "faster" (61 MB) is faster than "equal" (59 MB) only where that is sure.
        ((Interval(0.25, 0.35), Interval(0.55, 0.65)), "faster"),
        ((Interval(0.25, 0.56), Interval(0.55, 0.65)), "equal"),
        ((None, None), "equal"),
        ((Interval(0.25, 0.35), None), "equal"),
    ],
)
def test_a_faster_graph_is_recommended_only_where_it_is_surely_faster(
    intervals: tuple[Interval | None, Interval | None], format_: str
) -> None:
    rows = (
        REPORT.row("fp32"),
        timed("faster", 0.3, intervals[0]),
        timed("equal", 0.6, intervals[1]),
    )
    found = recommend(replace(REPORT, rows=rows))
    assert found is not None
    assert found.format == format_


def test_of_graphs_equal_in_speed_and_size_the_first_is_recommended() -> None:
    first, second = (replace(timed(name, 0.3, None), bytes=7) for name in ("faster", "equal"))
    for rows in ((first, second), (second, first)):
        found = recommend(replace(REPORT, rows=(REPORT.row("fp32"), *rows)))
        assert found is not None
        assert found.format == rows[0].name


def test_recommends_nothing_that_misses_a_gate() -> None:
    report = replace(REPORT, gates=Gates(max_size=1))
    assert recommend(report) is None
    assert report_dict(report)["recommendation"] is None
    assert "no low-bit graph to deploy" in markdown_table(report)


def test_round_trip_through_json(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    assert read_report(file) is None
    for damaged in ("{}", '{"rows": ['):
        file.write_text(damaged)
        with pytest.raises(RecipeError, match=r"eval\.json is damaged.*evaluate again"):
            read_report(file)
    file.write_text(json.dumps(report_dict(REPORT)))
    assert read_report(file) == REPORT
    content = json.loads(file.read_text())
    assert content["rows"][5]["drop"] == pytest.approx(20)
    assert content["recommendation"]["files"] == ["onnx/model_equal.onnx"]


def test_markdown_has_a_column_per_model_and_marks_what_is_significant() -> None:
    lines = markdown_table(REPORT).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {len(REPORT.rows) + 2}
    cars = next(line for line in table if line.startswith("| cars"))
    assert cars.split("|")[4:8] == [" 80.0 \\+ ", " 70.0 ", " 70.0 ", " 50.0 \\- "]
    assert any("traffic\\_signs" in line for line in table)
    assert any("worse than fp32 merged by 20.00 points [" in line for line in lines)
    assert "deploy onnx/model_equal.onnx" in lines[-1]


def test_only_low_bit_graphs_are_held_against_gates() -> None:
    rows = [replace(row, low_bit=row.name == "better") for row in REPORT.rows]
    assert [row.name for row in replace(REPORT, rows=tuple(rows)).candidates] == ["better"]
    # Reports of earlier versions name their references alone.
    assert {row.name for row in REPORT.candidates} == {"better", "faster", "equal", "worse"}
