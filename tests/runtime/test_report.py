"""The evaluation report as plain data."""

import json
from pathlib import Path

import pytest

from epmq_deploy.errors import GateError
from epmq_deploy.runtime.latency import Latency
from epmq_deploy.runtime.report import EvalReport, Row, read_report

REPORT = EvalReport(
    rows=(
        Row("experts", {"a": 90.0, "b": 80.0}),
        Row("fp32", {"a": 70.0, "b": 60.0}, 1000, Latency(1.0, 2.0)),
        Row("good", {"a": 71.0, "b": 61.0}, 100, Latency(0.5, 0.6)),
        Row("bad", {"a": 68.0, "b": 59.0}, 100, Latency(0.5, 0.6)),
    ),
    samples={"a": 10, "b": 20},
    provider="CPUExecutionProvider",
    threads=None,
    fingerprint="mark",
)


def test_drop_is_in_points_of_the_average_over_tasks() -> None:
    drops = {row.name: REPORT.drop(row) for row in REPORT.rows}
    assert drops == {"experts": None, "fp32": 0.0, "good": -1.0, "bad": 1.5}


def test_gate_names_what_missed_it_and_nothing_else() -> None:
    REPORT.check_drop(None)
    REPORT.check_drop(1.5)
    with pytest.raises(GateError) as caught:
        REPORT.check_drop(1.4)
    assert "bad lost 1.50 points" in str(caught.value)
    assert "good" not in str(caught.value)
    with pytest.raises(GateError) as caught:
        REPORT.check_drop(-2)
    assert "good lost -1.00 points" in str(caught.value)
    assert "fp32 lost" not in str(caught.value)


def test_a_drop_of_exactly_the_allowed_size_passes() -> None:
    rows = (Row("fp32", {"a": 0.1, "b": 0.2}), Row("low", {"a": -0.9, "b": -0.8}))
    EvalReport(rows, {"a": 1, "b": 1}, "cpu", None, "mark").check_drop(1.0)


def test_round_trip_through_json(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    assert read_report(file) is None
    file.write_text(json.dumps(REPORT.as_dict()))
    assert read_report(file) == REPORT
    assert json.loads(file.read_text())["rows"][3]["drop"] == 1.5
