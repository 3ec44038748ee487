"""Safetensors files with odd headers, and indexes of shards."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import cases, succeeds_or_explains
from hypothesis import given
from mutations import broken_json, damaged
from safetensors.torch import save

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.weight_scan import scan
from epmq_deploy.errors import RecipeError

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.bias": torch.ones(5, dtype=torch.float16),
    "c": torch.zeros(2, dtype=torch.int64),
}
CONTENT = save(TENSORS, {"format": "pt"})
(LENGTH,) = struct.unpack("<Q", CONTENT[:8])
HEADER: dict[str, Any] = json.loads(CONTENT[8 : 8 + LENGTH])
INDEX = {
    "metadata": {"total_size": 100},
    "weight_map": {"a.weight": "model-00001-of-00001.safetensors", "c": "other.safetensors"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def read_everything(folder: Path) -> None:
    checkpoint = Checkpoint.open(ModelFolder.at(folder))
    for name in checkpoint.tensors:
        checkpoint.load(name)
    for file in checkpoint.source.weight_files:
        _ = scan(file).sha256


@cases(1200)
@given(header=broken_json(HEADER))
def test_headers_with_odd_values(folder: Path, header: bytes) -> None:
    content = struct.pack("<Q", len(header)) + header + CONTENT[8 + LENGTH :]
    (folder / "model.safetensors").write_bytes(content)
    succeeds_or_explains(lambda: read_everything(folder))


@cases(800)
@given(content=damaged(CONTENT))
def test_damaged_files(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    succeeds_or_explains(lambda: read_everything(folder))


@cases(700)
@given(index=broken_json(INDEX))
def test_indexes_with_odd_values(tmp_path_factory: pytest.TempPathFactory, index: bytes) -> None:
    folder = tmp_path_factory.mktemp("index")
    for name in INDEX["weight_map"].values():  # type: ignore[attr-defined]
        (folder / name).write_bytes(CONTENT)
    (folder / "model.safetensors.index.json").write_bytes(index)
    succeeds_or_explains(lambda: read_everything(folder))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../..", "..", "../secret.safetensors", "a/../../secret", "/", "\0", "~/x", ""],
)
def test_an_index_names_files_of_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And nothing else is opened, or even looked at."""
    (tmp_path / "secret.safetensors").write_bytes(CONTENT)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    opened = []
    original = Path.open

    def watched(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    with pytest.raises(RecipeError, match=r"outside its folder|shards missing"):
        _ = ModelFolder.at(folder).weight_files
    assert {path.parent for path in opened} <= {folder}
