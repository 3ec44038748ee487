"""Prefixes of wrappers around a model are recognised by what names fit without them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import ARCHITECTURES, build_tiny_models
from tiny_folder import TinyFolder
from tiny_open_clip import random_tensors, write
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from tiny_zoo import build_tiny_zoo

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.data.heads import build_heads
from epmq_deploy.errors import MismatchError
from epmq_deploy.merging.preflight import check_experts
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import Sources, open_sources
from epmq_deploy.recipe import load_recipe

PREFIXES = ("module.", "_orig_mod.", "model.", "module._orig_mod.model.", "base_model.model.")


def rename_all(folder: Path, prefix: str) -> None:
    """Put a prefix before the names of all tensors of a model."""
    file = folder / "model.safetensors"
    tensors = {f"{prefix}{name}": value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def sources_of(tiny: TinyFolder) -> Sources:
    return open_sources(load_recipe(tiny.recipe))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["roberta", "vit", "electra"])
def test_encoders_are_read_without_prefixes(
    tmp_path: Path, kind: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    models = build_tiny_models(tmp_path, ARCHITECTURES[kind])
    family = family_of(models.base)
    plain = sources_of(models)
    expected = {name: plain.experts["first"].load(name) for name in plain.experts["first"].tensors}
    tasks = load_recipe(models.recipe).tasks
    head = build_heads(tasks, family, models.base, 32)["first"]
    names, loaded = check_experts(plain), family.load(models.base).state_dict()
    rename_all(models.base, prefix)
    rename_all(models.expert("first"), prefix)
    wrapped = sources_of(models)
    assert check_experts(wrapped) == names
    again = wrapped.experts["first"]
    assert again.tensors.keys() == expected.keys()
    assert all(torch.equal(again.load(name), value) for name, value in expected.items())
    reloaded = family.load(models.base).state_dict()
    assert all(torch.equal(reloaded[name], value) for name, value in loaded.items())
    same = build_heads(tasks, family, models.base, 32)["first"]
    assert torch.equal(same.weight, head.weight)
    assert "names of tensors are read without" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.model."])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "t5"])
def test_text_generators_keep_the_prefix_that_is_theirs(
    tmp_path: Path, kind: str, prefix: str
) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS[kind])
    plain = sources_of(models)
    names = check_experts(plain)
    expected = {name: plain.base.load(name) for name in plain.base.tensors}
    rename_all(models.base, prefix)
    rename_all(models.expert("second"), prefix)
    wrapped = sources_of(models)
    assert check_experts(wrapped) == names
    assert all(torch.equal(wrapped.base.load(name), value) for name, value in expected.items())
    family_of(models.base).load(models.base)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_clip(tmp_path: Path, prefix: str) -> None:
    models = build_tiny_zoo(tmp_path)
    plain = sources_of(models)
    names = check_experts(plain)
    task = next(iter(plain.experts))
    rename_all(models.base, prefix)
    rename_all(models.expert(task), prefix)
    wrapped = sources_of(models)
    assert wrapped.base.tensors.keys() == plain.base.tensors.keys()
    assert check_experts(wrapped) == names
    family_of(models.base).load(models.base)


def test_wrappers_within_a_model(tmp_path: Path) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    names = check_experts(sources_of(models))
    file = models.expert("first") / "model.safetensors"
    changes = ((".layer.", "._fsdp_wrapped_module.layer."), (".0.", ".0._orig_mod."))
    tensors = load_file(file)
    for old, new in changes:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    assert any("_fsdp_wrapped_module.layer.0._orig_mod." in name for name in tensors)
    save_file(tensors, file)
    assert check_experts(sources_of(models)) == names


def test_a_classifier_outside_of_the_wrapped_encoder(tmp_path: Path) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    family, tasks = family_of(models.base), load_recipe(models.recipe).tasks
    head = build_heads(tasks, family, models.base, 32)["first"]
    file = models.expert("first") / "model.safetensors"
    tensors = {
        name if name.startswith("classifier.") else f"backbone.{name}": value
        for name, value in load_file(file).items()
    }
    save_file(tensors, file)
    check_experts(sources_of(models))
    assert torch.equal(build_heads(tasks, family, models.base, 32)["first"].weight, head.weight)


def test_other_prefixes_are_not_guessed(tmp_path: Path) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    rename_all(models.expert("first"), "teacher.")
    with pytest.raises(MismatchError, match=r"expert 'first': lacks .*which other experts have"):
        check_experts(sources_of(models))


def test_open_clip_models(tmp_path: Path) -> None:
    tensors = random_tensors()
    plain = Checkpoint.open(ModelFolder.at(write(tmp_path / "plain", tensors)))
    for number, prefix in enumerate(("module.", "_orig_mod.", "model.")):
        wrapped = {f"{prefix}{name}": value for name, value in tensors.items()}
        folder = ModelFolder.at(write(tmp_path / str(number), wrapped))
        assert Checkpoint.open(folder).tensors.keys() == plain.tensors.keys()
