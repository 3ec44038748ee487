"""Merging CLIP's image tower, its text tower or both."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image as Picture
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from epmq_deploy.data.agreement import Judge
from epmq_deploy.data.heads import build_heads, heads_of_experts
from epmq_deploy.data.samples import batches
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.stage import merge, merge_fingerprint
from epmq_deploy.models import TaskHead, family_of
from epmq_deploy.models.experts import open_sources
from epmq_deploy.quantization.context import CalibrationContext
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import DataSource, Recipe, override, parse_recipe

CLASSES = ("cat", "dog", "house")
TEMPLATES = ("a photo of {}", "{}")
WORDS = ("<pad>", "<unk>", "a", "photo", "of", *CLASSES, "<end>")
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "projection_dim": 12,
}
CPU = torch.device("cpu")


def config() -> CLIPConfig:
    end = len(WORDS) - 1
    text = {"num_hidden_layers": 1, "vocab_size": len(WORDS), "eos_token_id": end}
    return CLIPConfig(
        vision_config=TOWER | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        text_config=TOWER | text | {"bos_token_id": 0, "max_position_embeddings": 12},
        projection_dim=12,
    )


def write_base(folder: Path) -> CLIPModel:
    torch.manual_seed(0)
    base = CLIPModel(config())
    base.save_pretrained(folder)
    core = Tokenizer(
        WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = Whitespace()
    end = len(WORDS) - 1
    core.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    return base


def fine_tuned(base: CLIPModel, seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    expert = CLIPModel(config())
    expert.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return expert


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, CLIPModel]]:
    """Base and two experts that were trained in both towers; where they are, and in memory."""
    folder = tmp_path_factory.mktemp("clip")
    found = {"base": write_base(folder / "base")}
    for seed, name in enumerate(("one", "two"), start=1):
        found[name] = fine_tuned(found["base"], seed)
        found[name].save_pretrained(folder / name)
    return folder, found


def recipe_of(folder: Path, part: str | None, **experts: Path) -> Recipe:
    chosen = experts or {"one": folder / "one", "two": folder / "two"}
    head = {"classes": CLASSES, "templates": TEMPLATES}
    tasks = {name: {"expert": str(path), "head": head} for name, path in chosen.items()}
    base: dict[str, Any] = {"path": str(folder / "base")}
    return parse_recipe({"base": base | ({"part": part} if part else {}), "tasks": tasks}, "recipe")


def is_text(name: str) -> bool:
    return name.startswith(("text_model.", "text_projection.", "logit_scale"))


def plain_head(model: CLIPModel, folder: Path) -> Tensor:
    """Rows of class names, one prompt at a time."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = []
    for name in CLASSES:
        units = []
        for template in TEMPLATES:
            tokens = tokenizer([template.replace("{}", name)], return_tensors="pt")
            with torch.no_grad():
                features = model.get_text_features(
                    tokens["input_ids"], tokens["attention_mask"]
                ).pooler_output[0]
            units.append(features / features.norm())
        mean = torch.stack(units).mean(dim=0)
        rows.append(mean / mean.norm() * model.logit_scale.exp())
    return torch.stack(rows).detach()


@pytest.mark.parametrize("part", [None, "image", "text", "both"])
def test_the_parts_asked_for_are_merged_and_the_rest_is_the_base_s(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path, part: str | None
) -> None:
    folder, held = models
    merge(recipe_of(folder, part), tmp_path / "merged")
    found = CLIPModel.from_pretrained(tmp_path / "merged").state_dict()
    one, two = (held[name].state_dict() for name in ("one", "two"))
    changed = 0
    for name, value in held["base"].state_dict().items():
        wanted = value
        merged_side = part == "both" or is_text(name) == (part == "text")
        if merged_side and value.is_floating_point():
            wanted = value + 0.3 * (one[name] - value + two[name] - value)
            changed += 1
        assert torch.allclose(found[name], wanted, atol=1e-6), name
    assert changed > 10


@pytest.mark.parametrize("part", ["image", "text", "both"])
def test_heads_follow_the_text_tower_that_is_merged(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path, part: str
) -> None:
    folder, held = models
    recipe = recipe_of(folder, part)
    merge(recipe, tmp_path / "merged")
    merged = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    family = family_of(tmp_path / "merged")
    heads = build_heads(recipe.tasks, family, tmp_path / "merged", 12)
    own = heads_of_experts(recipe.tasks, open_sources(recipe), heads, CPU)
    base = plain_head(held["base"].eval(), folder / "base")
    for task in ("one", "two"):
        wanted = plain_head(merged, tmp_path / "merged")
        assert torch.allclose(heads[task].weight, wanted, atol=1e-4)
        assert torch.allclose(wanted, base, atol=1e-4) == (part == "image")
        if part != "image":
            wanted = plain_head(held[task].eval(), folder / "base")
        assert torch.allclose(own[task].weight, wanted, atol=1e-4)


def test_only_heads_from_class_names_differ_between_experts(
    models: tuple[Path, dict[str, CLIPModel]],
) -> None:
    folder, _ = models
    recipe = recipe_of(folder, "both")
    matrix = {"head": None}
    tasks = {name: task.model_copy(update=matrix) for name, task in recipe.tasks.items()}
    heads = {"one": TaskHead(torch.eye(3, 12))}
    found = heads_of_experts(tasks, open_sources(recipe), heads, CPU)
    assert found == heads


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_towers_on_their_own_are_experts(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path, kind: type
) -> None:
    folder, held = models
    alone = kind(held["one"].config.text_config)
    state = held["one"].state_dict()
    plain = kind is CLIPTextModel
    names = {name: f"text_model.{name}" if plain else name for name in alone.state_dict()}
    alone.load_state_dict({name: state[full] for name, full in names.items()})
    alone.save_pretrained(tmp_path / "alone")
    if plain:
        stored = load_file(tmp_path / "alone" / "model.safetensors")
        assert not any(name.startswith("text_model.") for name in stored)
    recipe = recipe_of(folder, "text", one=tmp_path / "alone")
    merge(override(recipe, "merge", {"scaling": 1.0}), tmp_path / "merged")
    found = CLIPModel.from_pretrained(tmp_path / "merged").state_dict()
    for name, value in held["base"].state_dict().items():
        taken = name in names.values()
        assert torch.allclose(found[name], state[name] if taken else value, atol=1e-6), name


def test_towers_that_are_not_there_are_named(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path
) -> None:
    folder, held = models
    tower = CLIPVisionModel(held["one"].config.vision_config)
    tower.save_pretrained(tmp_path / "image")
    with pytest.raises(MismatchError, match="asks for the text tower, which no expert holds"):
        merge(recipe_of(folder, "both", one=tmp_path / "image"), tmp_path / "merged")
    with pytest.raises(MismatchError, match=r"expert 'one': lacks text_model\..*other experts"):
        recipe = recipe_of(folder, "both", one=tmp_path / "image", two=folder / "two")
        merge(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_text_architecture_is_refused_where_it_is_merged(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path
) -> None:
    folder, held = models
    held["one"].save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "config.json"
    content = json.loads(file.read_text())
    content["text_config"]["num_attention_heads"] = 4
    file.write_text(json.dumps(content))
    merge(recipe_of(folder, "image", one=tmp_path / "one"), tmp_path / "image")
    with pytest.raises(MismatchError, match=r"num_attention_heads is 4 .* the base has 2"):
        merge(recipe_of(folder, "both", one=tmp_path / "one"), tmp_path / "both")


@pytest.mark.parametrize(
    "flags", [{"method": "fisher"}, {"method": "regmean"}, {"method": "ties", "search": True}]
)
def test_merging_by_data_is_for_the_image_tower(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path, flags: dict[str, Any]
) -> None:
    folder, _ = models
    with pytest.raises(RecipeError, match=r"base\.part: both: .* runs the image tower alone"):
        merge(override(recipe_of(folder, "both"), "merge", flags), tmp_path / "merged")


def test_other_families_have_no_parts(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    wide = {name: TOWER[name] for name in TOWER if name != "projection_dim"}
    ViTForImageClassification(ViTConfig(**wide, **small)).save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match=r"base\.part: text: models of the vit family have no"):
        merge(recipe_of(tmp_path, "text", one=tmp_path / "base"), tmp_path / "merged")


def test_the_part_decides_the_merge(models: tuple[Path, dict[str, CLIPModel]]) -> None:
    folder, _ = models
    marks = {merge_fingerprint(recipe_of(folder, part), {}) for part in ("image", "text", "both")}
    assert len(marks) == 3


def test_codes_are_guided_by_experts_with_their_own_text_towers(
    models: tuple[Path, dict[str, CLIPModel]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models[0], folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}}
    settings["crop_size"] = {"height": 16, "width": 16}
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8, generator=generator)
    rows = {"image": [Picture.fromarray(image.numpy()) for image in pixels], "label": [0] * 6}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    source = DataSource(path=str(tmp_path / "data.parquet"))
    recipe = recipe_of(folder, "both")
    tasks = {
        name: task.model_copy(update={"calibration": source}) for name, task in recipe.tasks.items()
    }
    recipe = override(recipe.model_copy(update={"tasks": tasks}), "quantize", {"distill": 1})
    merge(recipe, tmp_path / "merged")
    judges = []
    judge = CalibrationContext.judge

    def remember(*arguments: Any) -> Judge:
        judges.append(judge(*arguments))
        return judges[-1]

    monkeypatch.setattr(CalibrationContext, "judge", remember)
    quantize(recipe, tmp_path / "merged", tmp_path / "quantized")
    (found,) = judges
    for name, wanted in found.wanted.items():
        model = models[1][name]
        (inputs,) = batches(found.samples[name], found.family, folder / "base", 8)
        with torch.no_grad():
            features = model.get_image_features(*inputs).pooler_output
        head = plain_head(model, folder / "base")
        assert torch.allclose(
            wanted.logits, features / features.norm(dim=1, keepdim=True) @ head.T, atol=1e-4
        )
        assert not torch.allclose(found.heads[name].weight, head, atol=1e-2)
