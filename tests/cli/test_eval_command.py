"""``epmq eval``: gates, diagnosis, providers and outputs."""

import json
import re
from pathlib import Path

import pytest
from command_line import run
from tiny_zoo import TASKS

from epmq_deploy.cpu import usable_cores


def test_missed_gates_end_with_5_after_the_report(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = ["--max-drop", "-200", "--max-size", "0.001", "--max-latency-ratio", "0.001"]
    arguments = ["--no-experts", "--threads", "1,2", "--latency-batches", "2"]
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", *gates, *arguments) == 5
    message = capsys.readouterr().err
    for format_ in ("matmulnbits", "qdq"):
        for missed in (r"lost [\d.]+ points", r"takes [\d.]+ of", r"takes [\d.]+ MB"):
            assert re.search(rf"{format_} {missed}", message), missed
    assert "fp32 lost" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.md", "e.html"}
    report = json.loads((tmp_path / "e.json").read_text())
    assert (len(report["misses"]), report["recommendation"]) == (6, None)
    timings = [(item["threads"], item["batch"]) for item in report["rows"][0]["timings"]]
    assert timings == [(1, 2), (2, 2)]
    assert run("eval", chain / "onnx", "-o", tmp_path / "f", "--max-drop", "200", "-q") == 0


def test_threads_are_those_this_process_may_use_and_recorded(chain: Path) -> None:
    report = json.loads((chain / "onnx/eval.json").read_text())
    threads = {timing["threads"] for row in report["rows"] for timing in row["timings"]}
    assert threads == {usable_cores()}


def test_every_quantized_layer_is_diagnosed(chain: Path, tmp_path: Path) -> None:
    arguments = ["--diagnose", "--diagnose-samples", "2", "--no-experts", "-q"]
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", *arguments) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    quantized = {layer["layer"] for layer in report["layers"] if layer["bits"]}
    assert set(report["diagnoses"]) == {"matmulnbits", "qdq"}
    for found in report["diagnoses"].values():
        assert {noise["layer"] for noise in found["layers"]} | {*found["missing"]} == quantized
        assert found["missing"] == ["vision_model.embeddings.position_embedding"]
        assert found["samples"] == 2 * len(TASKS)
        assert all(5 < noise["own_db"] < 100 for noise in found["layers"])
    assert "Layers of qdq against fp32 merged" in (tmp_path / "e.html").read_text()


def test_layers_in_int8_are_diagnosed_on_what_they_were_meant_to_read(
    chain: Path, tmp_path: Path
) -> None:
    """Smoothing divides inputs, and patches are multiplied instead of convolved."""
    out = tmp_path / "out"
    assert run("export", chain / "quantized", "-o", out, "--target", "cpu", "-q") == 0
    assert run("eval", out, "--diagnose", "--no-experts", "-q") == 0
    report = json.loads((out / "eval.json").read_text())
    own = {
        name: {noise["layer"]: noise["own_db"] for noise in found["layers"]}
        for name, found in report["diagnoses"].items()
    }
    in_int8, in_float = own["int8-expand"], own["matmulnbits"]
    assert in_int8.keys() == in_float.keys()
    assert len(in_int8) > 12
    blocks = [layer for layer in in_int8 if ".layers." in layer]
    # Rounding weights to 4 bits is the larger part of the noise.
    assert all(abs(in_int8[layer] - in_float[layer]) < 1 for layer in blocks)


def test_a_provider_that_is_not_there_stops_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.json", "--provider", "npu") == 2
    assert "provider 'npu' is not in this onnxruntime" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()


def test_eval_checks_its_output_before_any_work(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (tmp_path, tmp_path / "none" / "eval.json"):
        assert run("eval", chain / "onnx", "-o", target) == 2
        assert "must be a file in an existing folder" in capsys.readouterr().err
    assert run("eval", chain / "onnx", "-o", tmp_path / "e.md") == 2
    assert "name the JSON file" in capsys.readouterr().err
