"""``epmq run`` on a disk that is too small: refused, or stopped and gone on with."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from command_line import run
from small_disk import resize, small_disk
from tiny_zoo import TinyZoo

from epmq_deploy import pipeline
from epmq_deploy.exporters import stage as export_stage
from epmq_deploy.hashing import file_sha256
from epmq_deploy.merging import stage as merge_stage
from epmq_deploy.quantization import stage as quantize_stage
from epmq_deploy.quantization.artifact import CODES_FILE

Usage = namedtuple("Usage", "total used free")
QUICK = ["--set", "export.formats=[matmulnbits],eval.latency_runs=1,eval.experts=false", "-q"]
RESULTS = "merged/model.safetensors", "quantized/quantized.safetensors", "exported/onnx/model.onnx"


def results(folder: Path) -> list[str]:
    return [file_sha256(folder / name) for name in RESULTS]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def reference(tiny: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with space enough."""
    output = tmp_path_factory.mktemp("reference") / "out"
    assert run("run", tiny.recipe, "-o", output, *QUICK) == 0
    return output


def test_a_disk_that_cannot_suffice_is_refused_before_any_work(
    tiny: TinyZoo,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = ["--recipe", str(tiny.recipe)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 2000))
    for command, arguments, what in (
        ("run", [tiny.recipe], "the run"),
        ("merge", [tiny.recipe], "the merged model"),
        ("quantize", [reference / "merged", *recipe], "the quantized model"),
        ("export", [reference / "quantized", *recipe], "the export"),
    ):
        assert run(command, *arguments, "-o", tmp_path / "out", "-q") == 1
        error = capsys.readouterr().err
        assert f"error: {tmp_path}/out: {what} needs at least " in error
        assert " MB and 0.00 MB are free there; free some space, or choose" in error
        assert list(tmp_path.iterdir()) == []


def test_estimates_are_less_than_what_is_written(
    reference: Path, tiny: TinyZoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not by an order of magnitude: they are worth something."""
    needed: dict[str, int] = {}
    for module in (pipeline, merge_stage, quantize_stage, export_stage):
        monkeypatch.setattr(
            module, "require_space", lambda _, size, what: needed.setdefault(what, size)
        )
    assert run("run", tiny.recipe, "-o", tmp_path / "out", *QUICK) == 0
    sizes = {
        "the merged model": size_of(reference / "merged"),
        "the quantized model": 2 * (reference / "quantized" / CODES_FILE).stat().st_size,
        "the export": size_of(reference / "exported"),
    }
    sizes["the run"] = sum(sizes.values())
    assert needed.keys() == sizes.keys()
    for what, size in sizes.items():
        assert size / 10 < needed[what] <= size, what


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8, 0.9])
def test_a_run_that_fills_the_disk_goes_on_when_there_is_space(
    tiny: TinyZoo,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    disk = tmp_path / "disk"
    kilobytes = size_of(reference) // 1024
    with small_disk(disk, max(64, int(share * kilobytes))):
        with monkeypatch.context() as patch:
            for module in (pipeline, merge_stage, quantize_stage, export_stage):
                patch.setattr(module, "require_space", lambda *_: None)
            assert run("run", tiny.recipe, "-o", disk / "out", *QUICK) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {disk}")
        assert ": the disk is full (" in line
        assert line.endswith("free some space and give the same command again")
        names = {path.name for path in disk.rglob("*")}
        assert not [name for name in names if name.endswith((".partial", ".lock", ".tmp"))]
        for stage in ("merged", "quantized", "exported"):
            folder = disk / "out" / stage
            assert not folder.exists() or (folder / "manifest.json").is_file()
        resize(disk, 10 * kilobytes)
        assert run("run", tiny.recipe, "-o", disk / "out", *QUICK) == 0
        assert results(disk / "out") == results(reference)
