"""Adapters as experts; LoRA compared with the explicit formula."""

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
from epmq_deploy.merging.stage import merge_fingerprint
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


def test_another_adapter_of_a_folder_is_another_expert(models: TinyModels) -> None:
    folder = models.folder / "adapter"
    write_adapter(models, factors())
    (folder / "mine").mkdir()
    for file in folder.glob("adapter_*"):
        file.rename(folder / "mine" / file.name)
    recipe = yaml.safe_load(models.recipe.read_text())
    recipe["tasks"]["first"]["adapter"] = "mine"
    models.recipe.write_text(yaml.safe_dump(recipe))
    tasks, family = load_recipe(models.recipe).tasks, family_of(models.base)
    head = build_heads(tasks, family, models.base, WIDTH)["first"]
    assert torch.equal(head.weight, random(3, WIDTH))
    # Both in one file.
    named = {
        key.replace("classifier.", f"classifier.modules_to_save.{name}.")
        if "classifier" in key
        else key.replace(".weight", f".{name}.weight"): value
        for name in ("mine", "twin")
        for key, value in factors().items()
    }
    hashes = []
    for name in ("mine", "twin"):
        write_adapter(models, named)
        recipe["tasks"]["first"]["adapter"] = name
        models.recipe.write_text(yaml.safe_dump(recipe))
        sources = opened(models)
        hashes.append(merge_fingerprint(load_recipe(models.recipe), sources.sha256()))
    assert hashes[0] != hashes[1]


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
    targets = ["word_embeddings", "dense"]
    write_adapter(models, made, fan_in_fan_out=True, target_modules=targets)
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
    write_adapter(models, made, target_modules=["projection", "query"])
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
        ({"peft_type": "LOREFT"}, "peft_type LOREFT"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING, which leaves weights as they are,"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base changed by init_lora_weights: pissa"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"megatron_config": {"a": 1}}, "Megatron layers"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    models: TinyModels, options: dict[str, Any], message: str
) -> None:
    write_adapter(models, factors(), **options)
    with pytest.raises(MismatchError, match=f"expert 'first': .*{message}.*merge_and_unload"):
        opened(models)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Without its magnitudes.
        ({"use_dora": True}, f"{QUERY}.lora_magnitude_vector.weight is missing"),
        ({"peft_type": "LOHA"}, f"{QUERY}.lora_A.weight is neither part"),
        ({"alpha_pattern": {"(": 1}}, f"{QUERY}: missing \\)"),
        ({"r": 0}, f"{QUERY}: .*should be a positive integer"),
        ({"lora_alpha": None}, f"{QUERY}: unsupported operand"),
        ({"r": "many"}, f"{QUERY}: "),
        ({"target_modules": ["key"]}, f"{QUERY}: .*not found"),
        ({"target_modules": 5}, "'int' object is not iterable"),
        ({"modules_to_save": 7}, "modules_to_save that is not a list of names"),
    ],
)
def test_settings_that_do_not_fit_are_errors(
    models: TinyModels, options: dict[str, Any], message: str
) -> None:
    write_adapter(models, factors(), **options)
    with pytest.raises(MismatchError, match=f"(?s)expert 'first': .*{message}"):
        opened(models)


def test_all_that_does_not_fit_is_named(models: TinyModels) -> None:
    made = factors()
    del made[f"{PREFIX}{DENSE}.lora_B.weight"]
    made[f"{PREFIX}{QUERY}.lora_A.weight"] = random(RANK, WIDTH + 1)
    made[f"{PREFIX}other.lora_A.weight"] = random(RANK, WIDTH)
    made[f"{PREFIX}other.lora_B.weight"] = random(WIDTH, RANK)
    value = QUERY.replace("query", "value")
    made[f"{PREFIX}{value}.lora_A.weight"] = random(RANK, WIDTH)
    made[f"{PREFIX}{value}.lora_B.weight"] = random(WIDTH, RANK)
    made[f"{PREFIX}{value}.lora_magnitude_vector"] = random(WIDTH)
    made[f"{PREFIX}stray.weight"] = random(WIDTH)
    key = QUERY.replace("query", "key")
    made[f"{PREFIX}{key}.lora_A.weight"] = random(2, WIDTH)
    made[f"{PREFIX}{key}.lora_B.weight"] = random(WIDTH, 2)
    write_adapter(models, made, target_modules=["query", "key", "value", "dense"])
    with pytest.raises(MismatchError) as caught:
        opened(models)
    text = str(caught.value)
    assert f"{DENSE}.lora_B.weight is missing" in text
    start = "adapter_config.json and the base make it"
    assert f"{QUERY}.lora_A.weight has shape [4, 33], {start} [4, 32]" in text
    assert "other is not a layer of the base (no tensor other.weight)" in text
    assert f"{value}.lora_magnitude_vector.weight is not part of an adapter" in text
    assert f"{key}.lora_A.weight has shape [2, 32], {start} [4, 32]" in text
    assert f"{key}.lora_B.weight has shape [32, 2], {start} [32, 4]" in text
    assert "stray.weight is neither part of the adapter, nor a tensor of the base, nor" in text


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
