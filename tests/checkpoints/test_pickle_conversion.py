"""Pickled weights: refused wherever they are, with a line that converts them as they are."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import load_file
from tiny_zoo import build_tiny_zoo
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from epmq_deploy.checkpoints.adapter_settings import ADAPTER_FILE
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.open_clip import OPEN_CLIP_FILES
from epmq_deploy.checkpoints.pickle_conversion import pickled_weights
from epmq_deploy.errors import RecipeError


def convert(message: str, folder: Path) -> None:
    """Run the line that an error's message ends with, as a shell does."""
    line = message[message.index("python -c") :]
    assert "\n" not in line
    command = f"{shlex.quote(sys.executable)}{line.removeprefix('python')}"
    subprocess.run(command, shell=True, check=True, cwd=folder, env={**os.environ})


def refused(folder: Path) -> str:
    with pytest.raises(RecipeError, match="pickled weights") as caught:
        ModelFolder.at(folder).check_expert()
    return str(caught.value)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder whose name a shell and a glob have to be kept from reading."""
    made = tmp_path / "it's [my] model@2 $HOME"
    made.mkdir()
    return made


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    """A tiny classifier, head included, and a copy of its embedding that shares its memory."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    state = BertForSequenceClassification(config).state_dict()
    embedding = state["bert.embeddings.word_embeddings.weight"]
    return state | {"tied.weight": embedding, "turned.weight": embedding.T}


def test_a_classifier_is_converted_with_its_head(
    folder: Path, classifier: dict[str, Tensor]
) -> None:
    torch.save(classifier, folder / "pytorch_model.bin")
    # What a training run leaves beside the weights.
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        torch.save({"nothing": torch.zeros(1)}, folder / name)
    convert(refused(folder), folder)
    assert ModelFolder.at(folder).weight_files == (folder / "model.safetensors",)
    assert same(load_file(folder / "model.safetensors"), classifier)
    assert "classifier.weight" in classifier


def test_shards_become_one_file(folder: Path, classifier: dict[str, Tensor]) -> None:
    names = list(classifier)
    for number in range(2):
        shard = {name: classifier[name] for name in names[number::2]}
        torch.save(shard, folder / f"pytorch_model-0000{number + 1}-of-00002.bin")
    convert(refused(folder), folder)
    assert same(load_file(folder / "model.safetensors"), classifier)


def test_of_a_training_checkpoint_its_weights_are_taken(
    folder: Path, classifier: dict[str, Tensor]
) -> None:
    wrapped = {f"module.{name}": value for name, value in classifier.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, folder / "epoch_3.pt")
    convert(refused(folder), folder)
    assert same(load_file(folder / "model.safetensors"), classifier)


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.pth", "weights.ckpt"])
def test_a_file_given_in_place_of_a_folder_is_converted(
    folder: Path, classifier: dict[str, Tensor], name: str
) -> None:
    torch.save(classifier, folder / name)
    with pytest.raises(RecipeError, match="convert them, and give the folder") as caught:
        ModelFolder.open(str(folder / name))
    convert(str(caught.value), folder)
    assert same(load_file(ModelFolder.at(folder).weight_files[0]), classifier)


@pytest.mark.parametrize(
    ("mark", "name", "target"),
    [
        ("adapter_config.json", "adapter_model.bin", ADAPTER_FILE),
        ("open_clip_config.json", "open_clip_pytorch_model.bin", OPEN_CLIP_FILES[0]),
        ("open_clip_config.json", "epoch_3.pt", OPEN_CLIP_FILES[0]),
    ],
)
def test_other_layouts_get_the_file_they_need(
    folder: Path, classifier: dict[str, Tensor], mark: str, name: str, target: str
) -> None:
    (folder / mark).write_text("{}")
    torch.save(classifier, folder / name)
    convert(refused(folder), folder)
    assert ModelFolder.at(folder).weight_files == (folder / target,)
    assert same(load_file(folder / target), classifier)


def test_an_open_clip_folder_with_both_layouts_keeps_to_its_own() -> None:
    names = ["open_clip_config.json", "open_clip_pytorch_model.bin", "pytorch_model.bin"]
    found = pickled_weights(names)
    assert found is not None
    assert found.first == "open_clip_pytorch_model.bin"


def test_folders_without_weights_are_not_said_to_have_pickles(folder: Path) -> None:
    (folder / "training_args.bin").touch()
    with pytest.raises(RecipeError, match=r"no model\.safetensors and no"):
        ModelFolder.at(folder).check_base()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"no adapter_model\.safetensors next to"):
        ModelFolder.at(folder).check_expert()


def test_the_command_prints_the_line_and_goes_on_after_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = build_tiny_zoo(folder)
    file = zoo.expert("red") / "model.safetensors"
    weights = load_file(file)
    torch.save(weights, file.with_name("pytorch_model.bin"))
    file.unlink()
    assert run("merge", zoo.recipe, "-o", folder / "merged") == 3
    convert(capsys.readouterr().err.strip(), folder)
    assert same(load_file(file), weights)
    assert run("merge", zoo.recipe, "-o", folder / "merged") == 0
