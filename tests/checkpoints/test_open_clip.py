"""Checkpoints in open_clip's layout, compared with a plain forward pass written after its code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_open_clip import HEADS, LAYERS, MODEL, PATCH, random_tensors, write
from tiny_zoo import SIZE, TASKS, WIDTH, TinyZoo, build_tiny_zoo
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import open_sources
from epmq_deploy.models.loading import fill
from epmq_deploy.recipe import load_recipe


@dataclass(frozen=True)
class Plain:
    """open_clip's forward pass, written out."""

    tensors: dict[str, Tensor]
    quick: bool

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, (WIDTH,), self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        )

    def transformer(self, start: str, layers: int, x: Tensor, mask: Tensor | None) -> Tensor:
        t = self.tensors
        for index in range(layers):
            block = f"{start}resblocks.{index}."
            attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            state = {
                name: t[f"{block}attn.{name}"]
                for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
            }
            attention.load_state_dict(state)
            y = self.norm(f"{block}ln_1", x)
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = self.norm(f"{block}ln_2", x)
            y = y @ t[f"{block}mlp.c_fc.weight"].T + t[f"{block}mlp.c_fc.bias"]
            y = y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y)
            x = x + y @ t[f"{block}mlp.c_proj.weight"].T + t[f"{block}mlp.c_proj.bias"]
        return x

    @torch.no_grad()
    def image(self, pixels: Tensor) -> Tensor:
        t = self.tensors
        patches = F.conv2d(pixels, t["visual.conv1.weight"], stride=PATCH).flatten(2).mT
        first = t["visual.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + t["visual.positional_embedding"]
        x = self.transformer("visual.transformer.", LAYERS, self.norm("visual.ln_pre", x), None)
        return self.norm("visual.ln_post", x[:, 0]) @ t["visual.proj"]

    @torch.no_grad()
    def text(self, ids: Tensor) -> Tensor:
        t = self.tensors
        x = t["token_embedding.weight"][ids] + t["positional_embedding"][: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        x = self.norm("ln_final", self.transformer("transformer.", 1, x, mask))
        return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ t["text_projection"]


@pytest.mark.parametrize("quick", [True, False])
def test_both_towers_compute_the_same(tmp_path: Path, quick: bool) -> None:
    tensors = random_tensors()
    folder = write(tmp_path / "model", tensors, quick_gelu=quick)
    plain, family = Plain(tensors, quick), family_of(folder)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        found = family.embed(family.load(folder), pixels)
    assert torch.allclose(found, F.normalize(plain.image(pixels), dim=-1), atol=1e-5)
    other = Plain(tensors, not quick).image(pixels)
    assert not torch.allclose(found, F.normalize(other, dim=-1), atol=1e-4)
    config = ModelFolder.at(folder).config
    assert config is not None
    whole = fill(CLIPModel(CLIPConfig.from_dict(config)), folder)
    # The end of a text has the largest id; what comes after it is padding.
    ids = torch.tensor([[38, 5, 7, 39, 0, 0], [38, 9, 11, 3, 17, 39]])
    with torch.no_grad():
        features = whole.get_text_features(ids).pooler_output
    assert torch.allclose(features, plain.text(ids), atol=1e-5)
    assert whole.logit_scale == tensors["logit_scale"]


def test_custom_text_towers_have_the_same_names(tmp_path: Path) -> None:
    tensors = random_tensors()
    plain = Checkpoint.open(ModelFolder.at(write(tmp_path / "plain", tensors)))
    moved = {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": value
        for name, value in tensors.items()
    }
    custom = Checkpoint.open(ModelFolder.at(write(tmp_path / "custom", moved, custom_text=True)))
    assert set(plain.tensors) == set(custom.tensors)
    assert all(torch.equal(plain.load(name), custom.load(name)) for name in plain.tensors)


def test_images_are_made_ready_as_the_config_says(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", random_tensors())
    image = Image.new("RGB", (30, 20), (255, 0, 51))
    (pixels,) = family_of(folder).collate(folder, [image])
    assert pixels.shape == (1, 3, SIZE, SIZE)
    expected = [(1 - 0.5) / 0.2, (0 - 0.4) / 0.3, (0.2 - 0.3) / 0.4]
    assert torch.allclose(pixels.mean(dim=(0, 2, 3)), torch.tensor(expected), atol=1e-5)


def test_settings_are_copied_as_transformers_has_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", random_tensors())
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    ModelFolder.at(folder).copy_settings(tmp_path / "copy")
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "tokenizer.json"}
    config = CLIPConfig.from_pretrained(tmp_path / "copy")
    assert config.vision_config.hidden_act == "quick_gelu"
    assert config.vision_config.num_attention_heads == HEADS


@pytest.fixture
def zoo(tmp_path: Path) -> TinyZoo:
    """The tiny zoo with its base, and one expert that is another random model, in this layout."""
    made = build_tiny_zoo(tmp_path)
    recipe = yaml.safe_load(made.recipe.read_text())
    recipe["base"]["path"] = "open/base"
    write(tmp_path / "open" / "base", random_tensors(), quick_gelu=True)
    for number, task in enumerate(TASKS[:2], start=1):
        changed = {
            name: value + 0.1 * random_tensors(number)[name]
            for name, value in random_tensors().items()
        }
        write(tmp_path / "open" / task, changed, quick_gelu=True)
        recipe["tasks"][task]["expert"] = f"open/{task}"
    del recipe["tasks"][TASKS[2]]
    made.recipe.write_text(yaml.safe_dump(recipe))
    return made


def test_merging_does_not_care_about_the_layout(zoo: TinyZoo, tmp_path: Path) -> None:
    recipe = load_recipe(zoo.recipe)
    sources = open_sources(recipe)
    names = check_experts(sources)
    assert {name.split(".")[0] for name in names} == {"vision_model", "visual_projection"}
    merge(recipe, tmp_path / "merged")
    merged = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    tensors = load_file(tmp_path / "open" / "base" / "open_clip_model.safetensors")
    for task in TASKS[:2]:
        expert = load_file(tmp_path / "open" / task / "open_clip_model.safetensors")
        for name in tensors:
            if name.startswith("visual."):
                base = random_tensors()[name]
                tensors[name] = tensors[name] + 0.3 * (expert[name] - base)
    with torch.no_grad():
        features = merged.get_image_features(pixels).pooler_output
    assert torch.allclose(features, Plain(tensors, quick=True).image(pixels), atol=1e-4)


def test_activations_are_compared_with_what_configs_leave_out(tmp_path: Path) -> None:
    """A published base does not name the activation; its default is quick_gelu."""
    family = family_of(write(tmp_path / "quick", random_tensors(), quick_gelu=True))
    base = ModelFolder.at(tmp_path / "quick").config
    other = ModelFolder.at(write(tmp_path / "other", random_tensors(), quick_gelu=False)).config
    assert base is not None
    assert other is not None
    del base["vision_config"]["hidden_act"]
    (problem,) = family.config_problems(base, other)
    assert "hidden_act is 'gelu' in its config.json, the base has 'quick_gelu'" in problem


def test_another_activation_is_another_architecture(zoo: TinyZoo, tmp_path: Path) -> None:
    write(tmp_path / "open" / TASKS[0], random_tensors(), quick_gelu=False)
    with pytest.raises(MismatchError, match=r"hidden_act is 'gelu' in its config\.json"):
        check_experts(open_sources(load_recipe(zoo.recipe)))


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("vision_cfg", "layers", [3, 4, 6, 3]),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "image_size", [16, 32]),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "proj_type", "mlp"),
        ("text_cfg", "embed_cls", True),
    ],
)
def test_other_architectures_are_refused(
    tmp_path: Path, section: str, option: str, value: Any
) -> None:
    changed = {section: {**MODEL[section], option: value}}  # type: ignore[dict-item]
    folder = write(tmp_path / "model", random_tensors(), **changed)
    with pytest.raises(RecipeError, match=f"{section}.{option}"):
        family_of(folder)


def test_tensors_clip_does_not_have_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", random_tensors() | {"logit_bias": torch.zeros(())})
    with pytest.raises(MismatchError, match="logit_bias"):
        Checkpoint.open(ModelFolder.at(folder))


def test_both_towers_of_open_clip_experts_are_merged(tmp_path: Path) -> None:
    base, expert = random_tensors(0), random_tensors(1)
    write(tmp_path / "base", base)
    write(tmp_path / "expert", expert)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "base": {"path": "./base", "part": "both"},
                "tasks": {"one": {"expert": "./expert"}},
                "merge": {"method": "task_arithmetic", "scaling": 1.0},
            }
        )
    )
    merge(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "merged")
    found = Checkpoint.open(ModelFolder.at(tmp_path / "merged"))
    wanted = Checkpoint.open(ModelFolder.at(tmp_path / "expert"))
    assert found.tensors.keys() == wanted.tensors.keys()
    for name in wanted.tensors:
        assert torch.allclose(found.load(name), wanted.load(name), atol=1e-5), name
