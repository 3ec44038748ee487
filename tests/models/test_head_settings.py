"""How hidden states become logits is the experts' to say, not the base's."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from tiny_families import ARCHITECTURES, FAMILY_TASKS, TinyModels, build_tiny_models

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.recipe import load_recipe


def change(folder: Path, **settings: Any) -> None:
    """Change settings in a folder's ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def models(tmp_path: Path) -> TinyModels:
    """ModernBERT whose experts read the mean, on a base that says nothing of it."""
    models = build_tiny_models(tmp_path, ARCHITECTURES["modernbert-mean"])
    change(models.base, classifier_pooling="cls")
    return models


def test_the_experts_pooling_is_used(models: TinyModels, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sources = open_sources(load_recipe(models.recipe))
    assert "classifier_pooling 'cls'; the experts' is used, 'mean'" in caplog.text
    family = sources.family
    backbone = ExpertBackbone(sources, torch.device("cpu"))
    inputs = family.example_inputs(models.base, 3)
    for task in FAMILY_TASKS:
        head = family.expert_head(sources.experts[task])
        assert head is not None
        named = dict(zip(family.input_names, inputs, strict=True))
        with torch.inference_mode():
            expected = models.expert_model(task)(**named).logits
            actual = head(family.embed(backbone.become(task), *inputs))
        assert torch.allclose(actual, expected, atol=1e-5)


def test_the_merged_model_says_so(models: TinyModels, tmp_path: Path) -> None:
    assert run("merge", models.recipe, "-o", tmp_path / "merged", "-q") == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["classifier_pooling"] == "mean"


def test_experts_that_differ_are_refused(models: TinyModels) -> None:
    task = next(iter(FAMILY_TASKS))
    change(models.expert(task), classifier_pooling="cls")
    with pytest.raises(RecipeError, match="classifier_pooling differs between experts"):
        open_sources(load_recipe(models.recipe))


def test_beit_s_norm_is_where_the_experts_have_it(tmp_path: Path) -> None:
    """Pre-trained BEiT normalises all tokens, fine-tuned BEiT the mean of the patches."""
    models = build_tiny_models(tmp_path, ARCHITECTURES["beit"])
    (tmp_path / "bare").mkdir()
    bare = build_tiny_models(tmp_path / "bare", ARCHITECTURES["beit-cls"])
    for file in bare.base.iterdir():
        file.replace(models.base / file.name)
    sources = open_sources(load_recipe(models.recipe))
    backbone = ExpertBackbone(sources, torch.device("cpu"))
    (pixels,) = sources.family.example_inputs(models.base, 2)
    with torch.inference_mode():
        expected = models.expert_model("first")(pixels).logits
        head = sources.family.expert_head(sources.experts["first"])
        assert head is not None
        assert head.norm_weight is not None
        actual = head(sources.family.embed(backbone.become("first"), pixels))
    assert torch.allclose(actual, expected, atol=1e-5)
