"""LoRA adapters as experts, compared with the explicit formula."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES, TinyModels, build_tiny_models
from torch import Tensor

from epmq_deploy.data.heads import build_heads
from epmq_deploy.errors import MismatchError
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, Sources, open_sources
from epmq_deploy.recipe import load_recipe

RANK, ALPHA, WIDTH = 4, 6, 32
QUERY = "roberta.encoder.layer.0.attention.self.query"
DENSE = "roberta.encoder.layer.1.output.dense"
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA",
    # What an adapter says of its base is not looked at.
    "base_model_name_or_path": "/nowhere/at/all",
    "r": RANK,
    "lora_alpha": ALPHA,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": ["classifier"],
    "target_modules": ["query", "dense"],
}


def random(*shape: int) -> Tensor:
    """Values of the size factors have."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.2


def factors() -> dict[str, Tensor]:
    """An adapter of two layers with the task's head, as ``peft`` names its tensors."""
    return {
        f"{PREFIX}{QUERY}.lora_A.weight": random(RANK, WIDTH),
        f"{PREFIX}{QUERY}.lora_B.weight": random(WIDTH, RANK),
        f"{PREFIX}{DENSE}.lora_A.weight": random(RANK, 64),
        f"{PREFIX}{DENSE}.lora_B.weight": random(WIDTH, RANK),
        f"{PREFIX}classifier.dense.weight": random(WIDTH, WIDTH),
        f"{PREFIX}classifier.dense.bias": random(WIDTH),
        f"{PREFIX}classifier.out_proj.weight": random(3, WIDTH),
        f"{PREFIX}classifier.out_proj.bias": random(3),
    }


@pytest.fixture
def models(tmp_path: Path) -> TinyModels:
    """Tiny RoBERTa models whose first expert is an adapter."""
    made = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    write_adapter(made, factors())
    return made


def write_adapter(models: TinyModels, tensors: dict[str, Tensor], **config: Any) -> None:
    """Make the first expert an adapter."""
    folder = models.folder / "adapter"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    recipe = yaml.safe_load(models.recipe.read_text())
    recipe["tasks"]["first"]["expert"] = "adapter"
    models.recipe.write_text(yaml.safe_dump(recipe))


def opened(models: TinyModels) -> Sources:
    """Base and experts."""
    return open_sources(load_recipe(models.recipe))


def of_base(models: TinyModels, module: str) -> Tensor:
    """The base's weight of a module, by the expert's name for it."""
    return load_file(models.base / "model.safetensors")[f"{module.removeprefix('roberta.')}.weight"]


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"alpha_pattern": {"self.query": 10}}, 10 / RANK),
        # A pattern matches whole parts of names only.
        ({"alpha_pattern": {"uery": 10}}, ALPHA / RANK),
        ({"r": 2, "rank_pattern": {"query": RANK, ".*dense": RANK}}, ALPHA / RANK),
    ],
)
def test_weights_are_the_base_s_with_the_change(
    models: TinyModels, options: dict[str, Any], scaling: float
) -> None:
    write_adapter(models, factors(), **options)
    expert = opened(models).experts["first"]
    made = factors()
    change = made[f"{PREFIX}{QUERY}.lora_B.weight"] @ made[f"{PREFIX}{QUERY}.lora_A.weight"]
    found = expert.load(f"{QUERY.removeprefix('roberta.')}.weight")
    assert change.abs().max() > 0.05
    assert torch.allclose(found, of_base(models, QUERY) + scaling * change, atol=1e-6)


def test_what_is_not_adapted_is_the_base_s(models: TinyModels) -> None:
    sources = opened(models)
    expert = sources.experts["first"]
    adapted = {f"{name.removeprefix('roberta.')}.weight" for name in (QUERY, DENSE)}
    for name in sources.base.tensors:
        alike = torch.equal(expert.load(name), sources.base.load(name))
        assert alike == (name not in adapted), name


def test_saved_modules_are_taken_whole(models: TinyModels) -> None:
    tasks, family = load_recipe(models.recipe).tasks, family_of(models.base)
    heads = build_heads(tasks, family, models.base, WIDTH)
    assert torch.equal(heads["first"].weight, random(3, WIDTH))
    assert torch.equal(heads["first"].pooler_weight, random(WIDTH, WIDTH))
    assert heads["first"].classes == 3


def test_an_adapter_is_an_expert_like_any_other(models: TinyModels) -> None:
    """Merged before, or on the fly: the same names to merge and the same weights to run."""
    sources = opened(models)
    names = check_experts(sources)
    expert = sources.experts["first"]
    whole = {name: expert.load(name) for name in expert.tensors}
    folder = models.folder / "whole"
    folder.mkdir()
    save_file(whole, folder / "model.safetensors")
    (folder / "config.json").write_text((models.expert("first") / "config.json").read_text())
    running = ExpertBackbone(sources, torch.device("cpu")).become("first").state_dict()
    models.recipe.write_text(models.recipe.read_text().replace("adapter", "whole"))
    again = opened(models)
    assert check_experts(again) == names
    plain = ExpertBackbone(again, torch.device("cpu")).become("first").state_dict()
    assert all(torch.equal(running[name], value) for name, value in plain.items())


def test_a_changed_adapter_is_a_changed_expert(models: TinyModels) -> None:
    before = opened(models).sha256()
    write_adapter(models, factors(), lora_alpha=ALPHA + 1)
    after = opened(models).sha256()
    assert {role for role in before if before[role] != after[role]} == {"expert:first"}


def test_embeddings_and_transposed_weights(models: TinyModels) -> None:
    table = "roberta.embeddings.word_embeddings"
    tokens = of_base(models, table).shape[0]
    made = {
        f"{PREFIX}{table}.lora_embedding_A": random(RANK, tokens),
        f"{PREFIX}{table}.lora_embedding_B": random(WIDTH, RANK),
        # As for weights stored ``[in, out]``: this one has 64 inputs.
        f"{PREFIX}{DENSE}.lora_A.weight": random(RANK, WIDTH),
        f"{PREFIX}{DENSE}.lora_B.weight": random(64, RANK),
    }
    write_adapter(models, made, fan_in_fan_out=True)
    expert = opened(models).experts["first"]
    for module, (a, b) in {
        table: ("lora_embedding_A", "lora_embedding_B"),
        DENSE: ("lora_A.weight", "lora_B.weight"),
    }.items():
        change = (made[f"{PREFIX}{module}.{b}"] @ made[f"{PREFIX}{module}.{a}"]).T
        found = expert.load(f"{module.removeprefix('roberta.')}.weight")
        assert torch.allclose(found, of_base(models, module) + 1.5 * change, atol=1e-6)


def test_convolutions(tmp_path: Path) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["vit"])
    module = "vit.embeddings.patch_embeddings.projection"
    # Names as the running model has them, and as files have them.
    query = "vit.encoder.layer.1.attention.attention.query"
    a, b = random(RANK, 3, 8, 8), random(WIDTH, RANK, 1, 1)
    made = {
        f"{PREFIX}{module}.lora_A.weight": a,
        f"{PREFIX}{module}.lora_B.weight": b,
        f"{PREFIX}{query}.lora_A.weight": random(RANK, WIDTH),
        f"{PREFIX}{query}.lora_B.weight": random(WIDTH, RANK),
    }
    write_adapter(models, made)
    sources = opened(models)
    name = f"{module.removeprefix('vit.')}.weight"
    pixels = torch.randn(2, 3, 8, 8)
    conv = torch.nn.functional.conv2d
    expected = conv(pixels, sources.base.load(name)) + 1.5 * conv(conv(pixels, a), b)
    assert torch.allclose(conv(pixels, sources.experts["first"].load(name)), expected, atol=1e-4)
    name = "layers.1.attention.q_proj.weight"
    change = sources.experts["first"].load(name) - sources.base.load(name)
    assert torch.allclose(change, 1.5 * random(WIDTH, RANK) @ random(RANK, WIDTH), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base changed by init_lora_weights: pissa"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"r": None}, "no r or no lora_alpha"),
        ({"lora_alpha": None}, "no r or no lora_alpha"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    models: TinyModels, options: dict[str, Any], message: str
) -> None:
    write_adapter(models, factors(), **options)
    with pytest.raises(MismatchError, match=f"expert 'first': .*{message}.*merge_and_unload"):
        opened(models)


def test_all_that_does_not_fit_is_named(models: TinyModels) -> None:
    made = factors()
    del made[f"{PREFIX}{DENSE}.lora_B.weight"]
    made[f"{PREFIX}{QUERY}.lora_A.weight"] = random(RANK, WIDTH + 1)
    made[f"{PREFIX}other.lora_A.weight"] = random(RANK, WIDTH)
    made[f"{PREFIX}other.lora_B.weight"] = random(WIDTH, RANK)
    made[f"{PREFIX}{QUERY}.lora_magnitude_vector"] = random(WIDTH)
    key = QUERY.replace("query", "key")
    made[f"{PREFIX}{key}.lora_A.weight"] = random(2, WIDTH)
    made[f"{PREFIX}{key}.lora_B.weight"] = random(WIDTH, 2)
    write_adapter(models, made)
    with pytest.raises(MismatchError) as caught:
        opened(models)
    text = str(caught.value)
    assert f"{DENSE} has a, not one pair A and B" in text
    assert f"{QUERY} has A [4, 33] and B [32, 4]" in text
    assert "other is not a layer of the base (no tensor other.weight)" in text
    assert "lora_magnitude_vector is neither a LoRA factor nor in modules_to_save" in text
    assert f"{key} has rank 2, adapter_config.json makes it 4" in text


def test_a_folder_with_adapter_and_model_is_refused(models: TinyModels) -> None:
    (models.folder / "adapter" / "model.safetensors").touch()
    with pytest.raises(MismatchError, match=r"both an adapter .* and a whole model"):
        opened(models)


def test_an_adapter_is_no_base(models: TinyModels) -> None:
    recipe = yaml.safe_load(models.recipe.read_text())
    recipe["base"]["path"] = "adapter"
    models.recipe.write_text(yaml.safe_dump(recipe))
    with pytest.raises(MismatchError, match="an adapter, where a whole model is needed"):
        opened(models)
