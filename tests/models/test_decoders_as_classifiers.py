"""Decoders whose experts classify: which family they belong to, and what becomes of their base."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_families import ARCHITECTURES, FAMILY_TASKS, TinyModels, build_tiny_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.models.experts import ExpertBackbone, open_sources
from epmq_deploy.models.generic.family import GenericFamily
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.recipe import load_recipe


def with_output_layer(models: TinyModels) -> dict[str, torch.Tensor]:
    """Save the base as people have it, with the layer that writes; its tensors in the file."""
    model = AutoModelForCausalLM.from_pretrained(models.base)
    model.save_pretrained(models.base)
    return load_file(models.base / "model.safetensors")


def without(folder: Path, key: str) -> None:
    """Take a key out of a folder's ``config.json``."""
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    del config[key]
    file.write_text(json.dumps(config))


@pytest.fixture
def llama(tmp_path: Path) -> TinyModels:
    return build_tiny_models(tmp_path, ARCHITECTURES["llama"])


def test_a_bare_base_is_a_classifier_s(llama: TinyModels) -> None:
    assert isinstance(family_of(llama.base), GenericFamily)
    without(llama.base, "architectures")
    assert isinstance(family_of(llama.base), GenericFamily)


def test_the_experts_decide_what_a_base_with_an_output_layer_is(llama: TinyModels) -> None:
    stored = with_output_layer(llama)
    assert "model.norm.weight" in stored
    assert generates_text(family_of(llama.base))
    assert isinstance(open_sources(load_recipe(llama.recipe)).family, GenericFamily)
    without(llama.base, "architectures")
    for task in FAMILY_TASKS:
        without(llama.expert(task), "architectures")
    assert generates_text(family_of(llama.base))
    assert isinstance(open_sources(load_recipe(llama.recipe)).family, GenericFamily)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_with_an_output_layer_goes_all_the_way(tmp_path: Path, name: str) -> None:
    """Where it is merged to is a folder that ``transformers`` loads, without what writes."""
    models = build_tiny_models(tmp_path, ARCHITECTURES[name])
    with_output_layer(models)
    out = tmp_path / "out"
    assert run("run", models.recipe, "-o", out, "--quiet") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged").base_model
    assert (
        type(merged).__name__
        in json.loads((out / "merged/config.json").read_text())["architectures"]
    )
    experts = [models.expert_model(task).base_model.state_dict() for task in FAMILY_TASKS]
    base = AutoModelForSequenceClassification.from_pretrained(models.base).base_model.state_dict()
    assert load_recipe(models.recipe).merge.method == "task_arithmetic"
    scaling = load_recipe(models.recipe).merge.scaling
    for key, value in merged.state_dict().items():
        expected = base[key] + scaling * sum(expert[key] - base[key] for expert in experts)
        assert torch.allclose(value, expected, atol=1e-5), key


@pytest.mark.parametrize(
    ("name", "modules"), [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "down_proj"])]
)
def test_adapters_of_classifiers_mean_what_peft_makes_of_them(
    tmp_path: Path, name: str, modules: list[str]
) -> None:
    """On the base with its output layer, and on GPT-2's transposed weights."""
    models = build_tiny_models(tmp_path, ARCHITECTURES[name])
    with_output_layer(models)
    torch.manual_seed(0)
    merged = {}
    for task, classes in FAMILY_TASKS.items():
        shutil.rmtree(models.expert(task))
        base = AutoModelForSequenceClassification.from_pretrained(models.base, num_labels=classes)
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=modules, fan_in_fan_out=name == "gpt2"
        )
        adapted: Any = get_peft_model(base, config)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key or "score" in key:
                parameter.data.normal_(std=0.2)
        adapted.save_pretrained(models.expert(task))
        merged[task] = adapted.merge_and_unload()
    sources = open_sources(load_recipe(models.recipe))
    backbone = ExpertBackbone(sources, torch.device("cpu"))
    inputs = sources.family.example_inputs(models.base, 3)
    for task, model in merged.items():
        head = sources.family.expert_head(sources.experts[task])
        assert head is not None
        with torch.inference_mode():
            actual = head(sources.family.embed(backbone.become(task), *inputs))
            # One by one, so without padding.
            for row, ids, mask in zip(actual, *inputs, strict=True):
                expected = model.eval()(input_ids=ids[None, : mask.sum()]).logits[0]
                assert torch.allclose(row, expected, atol=1e-5)


def test_a_bare_base_of_experts_that_write_is_refused(llama: TinyModels) -> None:
    for task in FAMILY_TASKS:
        config = AutoConfig.from_pretrained(llama.expert(task))
        AutoModelForCausalLM.from_config(config).save_pretrained(llama.expert(task))
    with pytest.raises(RecipeError, match="a decoder without the output layer that its experts"):
        open_sources(load_recipe(llama.recipe))


def test_classifiers_on_an_encoder_decoder_are_refused(llama: TinyModels) -> None:
    config = T5Config(
        vocab_size=15,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(llama.base)
    with pytest.raises(RecipeError, match="experts are classifiers of texts, but models of the t5"):
        open_sources(load_recipe(llama.recipe))


@pytest.mark.parametrize("padding", [-1, 15, 32000])
def test_padding_that_is_no_token_counts_as_none(llama: TinyModels, padding: int) -> None:
    file = llama.base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": padding}))
    family = family_of(llama.base)
    ids, mask = family.collate(llama.base, ["red green blue", "house"])
    embeddings = family.embed(family.load(llama.base), ids, mask)
    (alone,) = family.embed(family.load(llama.base), ids[1:, :3], mask[1:, :3])
    assert torch.allclose(embeddings[1], alone, atol=1e-5)


def test_the_end_of_a_text_pads_where_nothing_else_does(
    llama: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    """As decoders' tokenizers come; logits are those of ``transformers`` without padding."""
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(llama.base)
    for folder in (llama.base, *(llama.expert(task) for task in FAMILY_TASKS)):
        without(folder, "pad_token_id")
    family = family_of(llama.base)
    texts = ["red green blue", "house", "tree river runs sleeps sings red"]
    with caplog.at_level(logging.INFO):
        ids, mask = family.collate(llama.base, texts)
    assert "no padding token, so [SEP] pads, masked" in caplog.text
    assert mask.sum(dim=1).tolist() == [5, 3, 8]
    embeddings = family.embed(family.load(llama.base), ids, mask)
    model = AutoModelForSequenceClassification.from_pretrained(llama.base).base_model.eval()
    for row, text in zip(embeddings, texts, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        assert torch.allclose(row, alone[0, -1], atol=1e-5)
