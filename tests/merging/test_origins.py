"""Experts of another base of the same shape are noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES, TinyModels, build_tiny_models
from tiny_folder import edit
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from torch import Tensor

from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.merging.stage import merge
from epmq_deploy.models.experts import open_sources
from epmq_deploy.recipe import load_recipe

FAR = "the norm of its task vector is"
MADE_FOR = "its adapter was made for"


def warnings(models: TinyModels, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    check_experts(open_sources(load_recipe(models.recipe)))
    return caplog.text


def other_weights(tensors: dict[str, Tensor]) -> None:
    """Weights of the same sizes from another start."""
    torch.manual_seed(5)
    for name, value in tensors.items():
        if value.dim() > 1:
            tensors[name] = torch.randn_like(value) * value.std()


def write_adapter(models: TinyModels, base: str | None) -> None:
    """Make the first expert an adapter that names its base."""
    folder = models.folder / "adapter"
    folder.mkdir(exist_ok=True)
    module = "base_model.model.roberta.encoder.layer.0.attention.self.query"
    factors = {"lora_A.weight": torch.randn(2, 32), "lora_B.weight": torch.randn(32, 2)}
    tensors = {f"{module}.{name}": value for name, value in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": base})
    )
    recipe = yaml.safe_load(models.recipe.read_text())
    recipe["tasks"]["first"]["expert"] = "adapter"
    models.recipe.write_text(yaml.safe_dump(recipe))


@pytest.fixture
def models(tmp_path: Path) -> TinyModels:
    return build_tiny_models(tmp_path, ARCHITECTURES["roberta"])


def test_fine_tuned_experts_are_near(models: TinyModels, caplog: pytest.LogCaptureFixture) -> None:
    assert FAR not in warnings(models, caplog)


def test_an_expert_of_another_base_is_far(
    models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    edit(models.expert("first"), other_weights)
    text = warnings(models, caplog)
    assert f"expert 'first': {FAR} 1.4" in text
    assert "expert 'second'" not in text
    caplog.clear()
    merge(load_recipe(models.recipe), models.folder / "merged")
    assert f"expert 'first': {FAR} 1.4" in caplog.text


def test_text_generators_are_compared_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generators = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["llama"])
    edit(generators.expert("second"), other_weights)
    check_experts(open_sources(load_recipe(generators.recipe)))
    assert f"expert 'second': {FAR} 1.4" in caplog.text


@pytest.mark.parametrize(
    ("name", "warns"),
    [
        ("roberta-base", False),
        ("FacebookAI/roberta-base", False),
        ("someone/RoBERTa-base-bnb-4bit", False),
        ("/home/someone/models/roberta-base/", False),
        (None, False),
        ("xlm-roberta-base", True),
        ("bert-base-uncased", True),
        ("/home/someone/outputs/run-3", True),
    ],
)
def test_an_adapter_names_its_base(
    models: TinyModels, caplog: pytest.LogCaptureFixture, name: str | None, warns: bool
) -> None:
    models.base.rename(models.folder / "roberta-base")
    models.recipe.write_text(models.recipe.read_text().replace("path: base", "path: roberta-base"))
    write_adapter(models, name)
    text = warnings(models, caplog)
    assert (f"expert 'first': {MADE_FOR} {name}, and the base is" in text) == warns
    assert FAR not in text


def test_a_base_of_any_name_may_say_what_it_is(
    models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(models, "roberta-base")
    assert MADE_FOR in warnings(models, caplog)
    file = models.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "roberta-base"}))
    assert MADE_FOR not in warnings(models, caplog)


def test_the_base_that_an_adapter_names_is_compared_where_it_is_here(
    models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    original = models.folder / "original"
    shutil.copytree(models.base, original)
    write_adapter(models, str(original))
    assert MADE_FOR not in warnings(models, caplog)
    half = {name: value.half() for name, value in load_file(original / "model.safetensors").items()}
    save_file(half, original / "model.safetensors")
    assert MADE_FOR not in warnings(models, caplog)
    edit(original, other_weights)
    text = warnings(models, caplog)
    assert f"expert 'first': {MADE_FOR} {original}, whose weights differ" in text
    assert "by 1.4" in text


def test_a_snapshot_of_the_hub_has_its_name(
    models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = models.folder / "models--FacebookAI--roberta-base" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    shutil.move(models.base, snapshot)
    recipe = models.recipe.read_text().replace("path: base", f"path: {snapshot}")
    models.recipe.write_text(recipe)
    write_adapter(models, "roberta-base")
    assert MADE_FOR not in warnings(models, caplog)


def test_values_that_are_not_finite_are_no_distance(
    models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    edit(models.base, lambda tensors: tensors.update({n: v * 0 for n, v in tensors.items()}))
    assert FAR not in warnings(models, caplog)
