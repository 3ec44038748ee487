"""Disk space: what is refused, and how a full disk is told from other errors."""

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from small_disk import small_disk

from epmq_deploy.artifacts.folders import atomic_folder, atomic_text
from epmq_deploy.artifacts.space import explaining_full_disk, require_space
from epmq_deploy.checkpoints.writing import write_tensors
from epmq_deploy.errors import DiskSpaceError, RecipeError
from epmq_deploy.exporters.files import write_model

Usage = namedtuple("Usage", "total used free")  # as shutil returns it
ZEROS = torch.zeros(600_000)


def test_what_cannot_suffice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 5 * 10**8))
    output = tmp_path / "not" / "there" / "yet"
    with pytest.raises(DiskSpaceError) as caught:
        require_space(output, 2_500_000_000, "the export")
    assert str(caught.value) == (
        f"{output}: the export needs at least 2.50 GB and 500.00 MB are free there; free some "
        "space, or choose an output on another disk"
    )
    require_space(output, 5 * 10**8, "the export")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    require_space(output, 10**12, "the export")


def graph() -> ir.Model:
    tensor = ir.Tensor(ZEROS.numpy(), name="weights")
    value = ir.Value(name="weights", const_value=tensor, shape=tensor.shape)
    return ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "x").write_bytes(bytes(2_400_000)),
        lambda folder: save_file({"a": ZEROS}, folder / "x"),
        lambda folder: write_tensors(
            folder / "x", {"a": (torch.float32, (600_000,))}, [("a", ZEROS)]
        ),
        lambda folder: ZEROS.numpy().tofile(folder / "x"),
        lambda folder: np.savez(folder / "x.npz", ZEROS.numpy()),
        lambda folder: write_model(graph(), folder / "x.onnx"),
        lambda folder: write_model(graph(), folder / "x.onnx", limit=1000),
    ],
    ids=["bytes", "safetensors", "ours", "numpy", "npz", "onnx", "external"],
)
def test_a_full_disk_is_one_sentence_however_it_is_met(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 1024):
        with (
            pytest.raises(
                DiskSpaceError, match=rf"{disk}: the disk is full \(.* free\); free some"
            ),
            atomic_folder(disk / "out") as folder,
        ):
            write(folder)
        assert list(disk.iterdir()) == []
        (disk / "old").write_text("old")
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            atomic_text(disk / "old", "x" * 2_000_000)
        assert [path.name for path in disk.iterdir()] == ["old"]
        assert (disk / "old").read_text() == "old"


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (ValueError("wrong"), OSError(errno.EACCES, "no"), RecipeError("No space left")):
        with pytest.raises(type(error)) as caught, explaining_full_disk(tmp_path):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_error_that_a_full_disk_led_to_says_so(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskSpaceError), explaining_full_disk(tmp_path):
        try:
            raise OSError(number, "full")
        except OSError as error:
            raise RecipeError("a file is cut short") from error


def test_a_full_disk_for_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"/elsewhere": 0}
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/elsewhere")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(10**10, 0, free.get(str(path), 10**9))
    )
    with (
        pytest.raises(DiskSpaceError, match="/elsewhere: the disk is full"),
        explaining_full_disk(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "full")
