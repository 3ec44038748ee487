"""Bare weights of open_clip, whose architecture is known by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import run
from safetensors.torch import load_file, save_file
from tiny_families import write_word_tokenizer
from tiny_open_clip import MODEL, random_tensors, write
from tiny_zoo import SIZE, TASKS, build_tiny_zoo
from torch import Tensor

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.checkpoints.open_clip import clip_config
from epmq_deploy.checkpoints.open_clip_weights import ARCHITECTURES, _folders
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.recipe import load_recipe

WIDER = json.loads(json.dumps(MODEL))
WIDER["vision_cfg"] |= {"width": 64, "head_width": 32}
DEEPER = json.loads(json.dumps(MODEL))
DEEPER["vision_cfg"]["layers"] += 1
SHALLOWER = json.loads(json.dumps(MODEL))
SHALLOWER["vision_cfg"]["layers"] -= 1


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of tiny architectures, in place of the real ones."""
    table = {"tiny": MODEL, "wider": WIDER, "deeper": DEEPER, "shallower": SHALLOWER}
    monkeypatch.setattr("epmq_deploy.checkpoints.open_clip_weights.ARCHITECTURES", table)


def bare(file: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """A weights file without anything that says what it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors or random_tensors(), file)
    return file


@pytest.mark.parametrize("given", ["file", "folder"])
def test_weights_compute_what_a_folder_with_a_config_does(tmp_path: Path, given: str) -> None:
    file = bare(tmp_path / "weights" / "cars.safetensors")
    found = ModelFolder.open(f"open_clip:tiny={file if given == 'file' else file.parent}").path
    folder = write(tmp_path / "folder", random_tensors())
    assert ModelFolder.at(found).config == ModelFolder.at(folder).config
    family, pixels = family_of(found), torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        outputs = [family.embed(family.load(where), pixels) for where in (found, folder)]
    assert torch.equal(*outputs)
    one, other = Checkpoint.open(ModelFolder.at(found)), Checkpoint.open(ModelFolder.at(folder))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.load(name), other.load(name)) for name in one.tensors)


def test_images_are_made_ready_as_openai_s(tmp_path: Path) -> None:
    found = ModelFolder.open(f"open_clip:tiny={bare(tmp_path / 'cars.safetensors')}").path
    settings = ModelFolder.at(found).preprocessor_config
    assert settings is not None
    assert settings["size"] == {"shortest_edge": SIZE}
    assert settings["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert settings["image_std"] == [0.26862954, 0.26130258, 0.27577711]


def zoo(folder: Path, *, bare_weights: bool) -> dict[str, Any]:
    """A recipe's content with base and experts as bare weights, or as folders with a config."""
    made = build_tiny_zoo(folder)
    content: dict[str, Any] = yaml.safe_load(made.recipe.read_text())
    start = random_tensors()

    def model(name: str, tensors: dict[str, Tensor]) -> str:
        if bare_weights:
            bare(folder / "open" / f"{name}.safetensors", tensors)
            return f"open_clip:tiny=open/{name}.safetensors"
        write(folder / "open" / name, tensors)
        return f"open/{name}"

    content["base"]["path"] = model("base", start)
    for number, task in enumerate(TASKS, start=1):
        noise = random_tensors(number)
        changed = {name: value + 0.1 * noise[name] for name, value in start.items()}
        content["tasks"][task]["expert"] = model(task, changed)
    made.recipe.write_text(yaml.safe_dump(content))
    return content


def test_recipes_and_flags_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {kind: tmp_path / kind for kind in ("bare", "configured")}
    for kind, folder in folders.items():
        folder.mkdir()
        zoo(folder, bare_weights=kind == "bare")
        assert run("merge", folder / "recipe.yaml", "-o", folder / "merged") == 0
    weights = [load_file(folder / "merged" / "model.safetensors") for folder in folders.values()]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    manifest = json.loads((folders["bare"] / "merged" / "manifest.json").read_text())
    place = folders["bare"] / "open"
    assert manifest["recipe"]["base"]["path"] == f"open_clip:tiny={place}/base.safetensors"

    monkeypatch.chdir(place)
    experts = ",".join(f"{task}=open_clip:tiny={task}.safetensors" for task in sorted(TASKS))
    base = ("--base", "open_clip:tiny=base.safetensors")
    assert run("merge", *base, "--expert", experts, "-o", tmp_path / "flags") == 0
    flags = load_file(tmp_path / "flags" / "model.safetensors")
    assert all(torch.equal(weights[0][name], flags[name]) for name in flags)


def test_quantizing_finds_the_models_unchanged(tmp_path: Path) -> None:
    """Hashes of inputs hold from process to process, wherever the weights are shown from."""
    zoo(tmp_path, bare_weights=True)
    assert run("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "merged") == 0
    quick = ("--preset", "weights", "--refine", 0, "--group-size", 16)
    _folders.clear()
    assert run("quantize", tmp_path / "merged", "-o", tmp_path / "quantized", *quick) == 0
    bare(tmp_path / "open" / f"{TASKS[0]}.safetensors", random_tensors(9))
    assert run("quantize", tmp_path / "merged", "-o", tmp_path / "other", *quick) == 3


def test_a_tokenizer_beside_the_weights_is_taken(tmp_path: Path) -> None:
    file = bare(tmp_path / "cars.safetensors")
    found = ModelFolder.open(f"open_clip:tiny={file}").path
    head = {"classes": ["red", "blue"], "templates": ["{}"], "device": torch.device("cpu")}
    family: Any = family_of(found)
    with pytest.raises(RecipeError, match=rf"^{tmp_path}: heads from class names need"):
        family.zero_shot_head(found, **head)
    (tmp_path / "with").mkdir()
    file = bare(tmp_path / "with" / "cars.safetensors")
    write_word_tokenizer(file.parent, 0)
    found = ModelFolder.open(f"open_clip:tiny={file}").path
    assert family.zero_shot_head(found, **head).shape[0] == 2
    # Nothing else that happens to lie there.
    assert not (found / "config.json").exists()


@pytest.mark.parametrize("name", ["wider", "deeper", "shallower"])
def test_the_wrong_name_is_told_with_the_right_one(tmp_path: Path, name: str) -> None:
    file = bare(tmp_path / "cars.safetensors")
    with pytest.raises(RecipeError, match=rf"not the weights of {name}: .* are those of tiny$"):
        ModelFolder.open(f"open_clip:{name}={file}")


def test_unknown_names_are_told_which_are_known(tmp_path: Path) -> None:
    file = bare(tmp_path / "cars.safetensors")
    with pytest.raises(RecipeError, match=r"tiny, wider, .* folder with open_clip_config\.json"):
        ModelFolder.open(f"open_clip:RN50={file}")


@pytest.mark.parametrize("text", ["open_clip:tiny", "open_clip:tiny=", "open_clip:=x"])
def test_other_forms_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"base": {"path": text}, "tasks": {"t": {"expert": "e"}}})
    )
    with pytest.raises(RecipeError, match="expected open_clip:NAME=PATH"):
        load_recipe(tmp_path / "r.yaml")


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            ModelFolder.open(f"open_clip:tiny={path}")

    refused(tmp_path / "nowhere", "no such file or folder")
    refused(tmp_path, "expected one safetensors file, found none")
    torch.save(random_tensors(), tmp_path / "cars.pt")
    refused(tmp_path, "only pickled weights.*python -c")
    refused(tmp_path / "cars.pt", "open_clip:NAME=FILE.*python -c")
    (tmp_path / "cars.txt").touch()
    refused(tmp_path / "cars.txt", "not a safetensors file")
    for name in ("a", "b"):
        bare(tmp_path / f"{name}.safetensors")
    refused(tmp_path, r"several \(a\.safetensors, b\.safetensors\)")
    refused(write(tmp_path / "whole", random_tensors()), "without open_clip:NAME=")


def test_weights_of_something_else_are_named_by_their_own_file(tmp_path: Path) -> None:
    file = bare(tmp_path / "bert.safetensors", {"encoder.weight": torch.zeros(2)})
    with pytest.raises(RecipeError, match=rf"{file}: not a CLIP in the layout .*: it has encoder"):
        ModelFolder.open(f"open_clip:tiny={file}")
    file = bare(tmp_path / "scale.safetensors", {"logit_scale": torch.zeros(())})
    with pytest.raises(
        RecipeError, match="it has neither tower; no known architecture has such tensors"
    ):
        ModelFolder.open(f"open_clip:tiny={file}")


def test_an_image_tower_alone_is_an_expert(tmp_path: Path) -> None:
    image = {name: value for name, value in random_tensors().items() if "visual" in name}
    found = ModelFolder.open(f"open_clip:tiny={bare(tmp_path / 'tower.safetensors', image)}").path
    names = Checkpoint.open(ModelFolder.at(found)).tensors
    assert {name.split(".")[0] for name in names} == {"vision_model", "visual_projection"}


def test_known_architectures_have_the_published_sizes() -> None:
    """Parameters of both towers, in millions, as the CLIP papers' released models have them."""
    from transformers import CLIPConfig, CLIPModel

    published = {"ViT-B-32": 151.28, "ViT-B-16": 149.62, "ViT-L-14": 427.62}
    published |= {"ViT-L-14-336": 427.94, "ViT-H-14": 986.11}
    assert set(ARCHITECTURES) == {
        f"{name}{kind}" for name in published for kind in ("", "-quickgelu")
    }
    for name, model in ARCHITECTURES.items():
        config = CLIPConfig.from_dict(clip_config({"model_cfg": model}, Path(name)))
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in CLIPModel(config).parameters())
        assert count / 1e6 == pytest.approx(published[name.removesuffix("-quickgelu")], abs=0.01)
        quick = name.endswith("-quickgelu")
        assert config.vision_config.hidden_act == ("quick_gelu" if quick else "gelu")
        assert config.vision_config.hidden_size % config.vision_config.num_attention_heads == 0
