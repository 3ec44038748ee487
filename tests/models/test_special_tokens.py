"""Tokens that end and pad texts: from all places that may say them, and odd ones."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, TinyTextGenerators, build_tiny_text_generators
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

from epmq_deploy.data.pseudo_labels import generate_pseudo_labels
from epmq_deploy.errors import EpmqError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.encoders.classifier import load_encoder
from epmq_deploy.models.text_generation.base import TextGenerationFamily
from epmq_deploy.models.text_generation.special_tokens import (
    count_endless,
    until_end,
    warn_of_endless,
)
from epmq_deploy.pipeline import preflight
from epmq_deploy.quantization.stage import calibration_samples
from epmq_deploy.recipe import load_recipe, parse_recipe

TEXTS = ["first : red house blue :", "second : tree :", "first : green :", "second : river red :"]


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file, which need not exist; None removes one."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    content |= values
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


@pytest.fixture(params=["llama", "t5"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> TinyTextGenerators:
    return build_tiny_text_generators(tmp_path, TEXT_GENERATORS[request.param])


def family(models: TinyTextGenerators) -> TextGenerationFamily:
    chosen = family_of(models.base)
    assert isinstance(chosen, TextGenerationFamily)
    return chosen


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (1, None, (1,)),
        ([1, 5], None, (1, 5)),
        (6, 5, (6, 5, 1)),
        (6, [5, 6, 7], (6, 5, 7, 1)),
        (None, [8, 9], (8, 9, 1)),
        ([-1, 5], [99999, True, "x"], (5, 1)),
    ],
)
def test_any_place_may_say_what_ends_an_answer(
    models: TinyTextGenerators, config: Any, generation: Any, ends: tuple[int, ...]
) -> None:
    """The tokenizer's is 1."""
    change(models.base / "config.json", eos_token_id=config)
    if generation is not None:
        change(models.base / "generation_config.json", eos_token_id=generation)
    assert family(models).special_tokens(models.base).end == ends


def test_without_any_end_there_is_one_sentence(models: TinyTextGenerators) -> None:
    change(models.base / "config.json", eos_token_id=-1)
    change(models.base / "tokenizer_config.json", eos_token="gone")
    with pytest.raises(
        RecipeError, match=r"no eos_token_id in config\.json, generation_config\.json"
    ):
        family(models).special_tokens(models.base)


@pytest.mark.parametrize("ends", ["one", "list"])
def test_answers_stop_at_ends_that_only_the_generation_config_has(
    models: TinyTextGenerators, ends: str
) -> None:
    """As those of the library that reads it by itself."""
    before = family(models)
    network = before.load(models.base)
    free = before.generate_ids(network, models.base, TEXTS, 8)
    row = next(answer for answer in free.tolist() if len(set(answer) - {0, 1}) > 1)
    token = next(token for token in row if token not in (0, 1))
    given = [1, token] if ends == "list" else token
    change(models.base / "generation_config.json", eos_token_id=given)
    merged = models.folder / "merged"
    merge(load_recipe(models.recipe), merged)
    chosen = family_of(merged)
    assert isinstance(chosen, TextGenerationFamily)
    ids, mask = chosen.prompts(merged, TEXTS)
    library = models.load(merged)
    others = {"pad_token_id": 0, "decoder_start_token_id": 0, "do_sample": False}
    reference = library.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **others)
    start = ids.shape[1] if before.encoder_decoder is None else 1
    tokenizer = AutoTokenizer.from_pretrained(merged)
    expected = [
        tokenizer.decode(answer, skip_special_tokens=True)
        for answer in until_end(reference[:, start:], (1, token))
    ]
    assert chosen.generate(chosen.load(merged), merged, TEXTS, 8) == expected
    assert any(token in answer for answer in free.tolist())


@pytest.mark.parametrize("padding", [-1, 10**6, None])
def test_padding_that_is_no_token(models: TinyTextGenerators, padding: int | None) -> None:
    before = family(models)
    expected = before.generate(before.load(models.base), models.base, TEXTS, 5)
    other = models.folder / "other"
    models.base.rename(other)
    for folder in (other, models.expert("first"), models.expert("second")):
        change(folder / "config.json", pad_token_id=padding, decoder_start_token_id=0)
    other.rename(models.base)
    after = family_of(models.base)
    assert isinstance(after, TextGenerationFamily)
    special = after.special_tokens(models.base)
    assert special.padding == (special.end[0] if special.start is None else 0)
    assert after.generate(after.load(models.base), models.base, TEXTS, 5) == expected
    preflight(load_recipe(models.recipe))


@pytest.mark.parametrize("start", [-1, 10**6, "x"])
def test_a_start_that_is_no_token(tmp_path: Path, start: Any) -> None:
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS["t5"])
    change(models.base / "config.json", decoder_start_token_id=start)
    with pytest.raises(EpmqError, match="decoder_start_token_id"):
        preflight(load_recipe(models.recipe))


@pytest.mark.parametrize("padding", [-1, 10**6])
def test_padding_of_encoders_that_is_no_token(tmp_path: Path, padding: int) -> None:
    models = build_tiny_text(tmp_path)
    for file in tmp_path.rglob("config.json"):
        change(file, pad_token_id=padding)
    preflight(load_recipe(models.recipe))
    # RoBERTa counts positions from it.
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=20, intermediate_size=8, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    change(tmp_path / "roberta" / "config.json", pad_token_id=padding)
    with pytest.raises(RecipeError, match=rf"pad_token_id is {padding}, which is no token"):
        load_encoder(tmp_path / "roberta", lambda key: key)
    # Llama remembers it and has no use for it.
    config = LlamaConfig(vocab_size=20, intermediate_size=8, **sizes)
    LlamaModel(config).save_pretrained(tmp_path / "llama")
    change(tmp_path / "llama" / "config.json", pad_token_id=padding)
    load_encoder(tmp_path / "llama", lambda key: key)


def test_answers_end_at_the_first_end() -> None:
    ids = torch.tensor([[5, 6, 1, 7], [5, 2, 0, 0], [5, 6, 7, 8], [1, 5, 6, 7]])
    assert until_end(ids, (1, 2)) == [[5, 6], [5], [5, 6, 7, 8], []]
    assert count_endless(ids, (1, 2)) == 1


@pytest.mark.parametrize("longest", [1, 30])
def test_answers_without_an_end_are_warned_about(
    models: TinyTextGenerators, caplog: pytest.LogCaptureFixture, longest: int
) -> None:
    content = load_recipe(models.recipe).model_dump()
    for task in content["tasks"].values():
        task["prompt"] |= {"answers": None, "max_tokens": longest}
        task["calibration"]["label_column"] = None
    chosen = family(models)
    samples = calibration_samples(parse_recipe(content, "test"), chosen, models.base)
    network = chosen.load(models.base)
    with torch.no_grad():
        # The end is what it writes, sooner or later.
        network.get_submodule("lm_head").weight[1].mul_(1.5)
    with caplog.at_level(logging.WARNING):
        answers = generate_pseudo_labels(samples, chosen, models.base, lambda task: network)
    assert {task: len(texts) for task, texts in answers.items()} == {"first": 16, "second": 16}
    warnings = [text for text in caplog.messages if "do not end within" in text]
    if longest == 1:
        assert len(warnings) == 2
        assert warnings[0].startswith("task 'first', pseudo-labels: ")
        assert " of 16 answers do not end within tasks.first.prompt.max_tokens (1 " in warnings[0]
    for count in (0, 8):
        warn_of_endless(count, 16, "x", "eval.max_tokens", 3)
    assert [text for text in caplog.messages if "do not end within" in text] == warnings
