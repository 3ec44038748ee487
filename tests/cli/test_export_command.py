"""``epmq export``: what the manifest holds, targets, and inputs it refuses."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import run
from tiny_zoo import TASKS

from epmq_deploy.exporters import read_codes
from epmq_deploy.exporters.formats import GraphFormat


def test_the_manifest_identifies_the_codes(chain: Path) -> None:
    """One byte a code, row by row; the layers are those of every low-bit file."""
    details = json.loads((chain / "onnx" / "manifest.json").read_text())["details"]
    for graph in details["graphs"]:
        if graph["low_bit_nodes"]:
            stored = read_codes(chain / "onnx" / graph["file"])
            digests = {
                name: hashlib.sha256(bytes(layer.codes.flatten().tolist())).hexdigest()
                for name, layer in stored.items()
            }
            assert digests == details["codes"]


def test_the_manifest_holds_the_distance_from_torch(chain: Path) -> None:
    details = json.loads((chain / "onnx" / "manifest.json").read_text())["details"]
    assert (details["parity_inputs"], details["tasks_without_parity"]) == ("calibration", {})
    for graph in details["graphs"]:
        parity = graph["parity"]
        assert parity["samples"] == 4 * len(TASKS)
        assert 0 < parity["relative"] < 1e-4
        assert parity["agreement"] == 1


def test_a_graph_too_far_from_torch_ends_with_4(
    chain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(GraphFormat, "tolerance", 0.0)
    assert run("export", chain / "quantized", "-o", tmp_path / "onnx") == 4
    assert "model.onnx differs from torch" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_target_picks_formats_and_refuses_what_it_cannot_run(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, quantized = tmp_path / "onnx", chain / "quantized"
    assert run("export", quantized, "-o", out, "--target", "tensorrt") == 2
    message = capsys.readouterr().err
    assert "blocks of 16, but its kernels take 64 or 128" in message
    advice = message.rpartition(": quantize with ")[2]
    assert "--group-size 128" in advice
    assert "--symmetric" in advice
    assert not out.exists()
    assert run("export", quantized, "-o", out, "--target", "cuda", "-q") == 0
    assert capsys.readouterr().err == ""
    details = json.loads((out / "manifest.json").read_text())["details"]
    assert [graph["format"] for graph in details["graphs"]] == ["fp32", "fp16", "matmulnbits"]
    assert details["target"]["name"] == "cuda"
    assert run("export", quantized, "-o", out, "--target", "cuda", "--overwrite") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"target cuda: {details['target']['why']}" in said
    assert f"not verified: {details['target']['unverified']}" in said


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_a_refused_model_quantized_as_advised_is_exported(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    """Too many bits inside the blocks and outside them, other groups, zero points."""
    method = ["--method", "rtn", "-q"]
    wrong = [*method, "--layers", "*.fc1:bits=8,*.fc2:group_size=32"]
    merged, first, second = chain / "merged", tmp_path / "first", tmp_path / "second"
    assert run("quantize", merged, "-o", first, *wrong) == 0
    assert run("export", first, "-o", tmp_path / "onnx", "--target", target) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    advice = shlex.split(message.rpartition(" (")[2].rstrip(")\n"))
    # The advised layers replace those given; a pattern given twice is an error.
    assert "--layers" in advice
    assert run("quantize", merged, "-o", second, *method, *advice) == 0
    assert run("export", second, "-o", tmp_path / "onnx", "--target", target, "-q") == 0


def test_damaged_artifact_is_not_exported(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chain / "quantized", tmp_path / "quantized")
    file = tmp_path / "quantized" / "quantized.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert run("export", tmp_path / "quantized", "-o", tmp_path / "onnx") == 2
    assert "quantized.safetensors was changed" in capsys.readouterr().err
