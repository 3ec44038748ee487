"""Weights are found whatever their files are called."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.full((2,), float(number))}, folder / name)


def index(folder: Path, name: str, *files: str) -> None:
    content = {"weight_map": {f"w{number}": file for number, file in enumerate(files)}}
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("pytorch_model.safetensors",), ("pytorch_model.safetensors",)),
        (("consolidated.safetensors",), ("consolidated.safetensors",)),
        (("weights.safetensors",), ("weights.safetensors",)),
        (("model.safetensors", "other.safetensors"), ("model.safetensors",)),
        (("other.safetensors", "pytorch_model.safetensors"), ("pytorch_model.safetensors",)),
        (("weights.safetensors", "optimizer.safetensors"), ("weights.safetensors",)),
        (SHARDS, SHARDS),
    ],
)
def test_the_files_of_the_model_are_found(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: tuple[str, ...],
    taken: tuple[str, ...],
) -> None:
    caplog.set_level("INFO")
    write(tmp_path, *names)
    folder = ModelFolder.open(str(tmp_path))
    assert tuple(file.name for file in folder.weight_files) == taken
    assert ("the weights are read from" in caplog.text) == ("model.safetensors" not in names)
    assert len(Checkpoint.open(folder).tensors) == len(taken)


def test_an_index_of_another_name(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", "b.safetensors")
    index(tmp_path, "pytorch_model.safetensors.index.json", "a.safetensors", "b.safetensors")
    folder = ModelFolder.open(str(tmp_path))
    assert [file.name for file in folder.weight_files] == ["a.safetensors", "b.safetensors"]
    assert folder.setting_files == ()


def test_what_is_not_clear_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "one.safetensors", "two.safetensors")
    with pytest.raises(RecipeError, match=r"several files could be the model \(one\..*two\."):
        ModelFolder.open(str(tmp_path)).check_base()


def test_missing_shards_without_an_index_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(RecipeError, match="shards missing: 2 of 3"):
        ModelFolder.open(str(tmp_path)).check_base()


@pytest.mark.parametrize("outside", ["/etc/passwd", "../model.safetensors", "a/../../b"])
def test_an_index_names_no_files_elsewhere(tmp_path: Path, outside: str) -> None:
    index(tmp_path, "model.safetensors.index.json", outside)
    with pytest.raises(RecipeError, match="names files outside its folder"):
        ModelFolder.open(str(tmp_path)).check_base()


@pytest.mark.parametrize("given", ["model.safetensors", "config.json"])
def test_a_file_of_a_model_stands_for_its_folder(tmp_path: Path, given: str) -> None:
    write(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert ModelFolder.open(str(tmp_path / given)).path == tmp_path


def test_a_shard_stands_for_its_folder(tmp_path: Path) -> None:
    write(tmp_path, *SHARDS)
    index(tmp_path, "model.safetensors.index.json", *SHARDS)
    assert ModelFolder.open(str(tmp_path / SHARDS[1])).path == tmp_path


def test_a_file_that_is_not_the_folders_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", "other.safetensors")
    with pytest.raises(RecipeError, match=r"other\.safetensors: not a file of the model in its"):
        ModelFolder.open(str(tmp_path / "other.safetensors"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecipeError, match="not a file of the model"):
        ModelFolder.open(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model-Q4_K_M.gguf", "GGUF"), ("tf_model.h5", "TensorFlow"), ("model.onnx", "ONNX")],
)
def test_other_formats_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(RecipeError, match=f"weights in the format of {kind}"):
            ModelFolder.open(str(given)).check_base()
    write(tmp_path, "model.safetensors")
    ModelFolder.open(str(tmp_path)).check_base()


def test_a_model_with_an_unmerged_adapter_is_named(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.base_layer.weight": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match="an adapter that is not merged into it"):
        Checkpoint.open(ModelFolder.open(str(tmp_path)))


def test_the_layout_of_the_first_releases_is_named(tmp_path: Path) -> None:
    tensors = {"layers.0.attention.wq.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    with pytest.raises(RecipeError, match="in its authors' layout"):
        Checkpoint.open(ModelFolder.open(str(tmp_path)))
