"""Tokenizers as they are stored: all that ``AutoTokenizer`` opens, and none that it makes up."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tiny_text import WORDS, build_tiny_text
from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from epmq_deploy.checkpoints.files import setting_files
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.text_generation.base import TextGenerationFamily
from epmq_deploy.models.tokenizer import open_tokenizer
from epmq_deploy.pipeline import preflight
from epmq_deploy.recipe import load_recipe

TEXTS = ["red house", "blue tree river", ""]


def write_sentencepiece(file: Path, kind: str = "unigram") -> None:
    """Train a model of a few words."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS[:-1], k=6)) for _ in range(300)]
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=content,
        vocab_size=50,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(content.getvalue())


def write_config(folder: Path, model_type: str, tokenizer_class: str | None = None) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_class is not None:
        settings = {"tokenizer_class": tokenizer_class}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("model_type", "name", "kind", "tokenizer_class"),
    [
        ("deberta-v2", "spm.model", "unigram", None),
        ("deberta-v2", "spm.model", "unigram", "DebertaV2Tokenizer"),
        ("xlm-roberta", "sentencepiece.bpe.model", "unigram", None),
        ("t5", "spiece.model", "unigram", None),
        ("llama", "tokenizer.model", "bpe", "LlamaTokenizer"),
        ("mistral", "tokenizer.model", "bpe", None),
    ],
)
def test_models_of_sentencepiece(
    tmp_path: Path, model_type: str, name: str, kind: str, tokenizer_class: str | None
) -> None:
    write_sentencepiece(tmp_path / name, kind)
    write_config(tmp_path, model_type, tokenizer_class)
    tokenizer = open_tokenizer(tmp_path, ("vocab.txt",), 1000, "texts need")
    assert (
        tokenizer(TEXTS)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"]
    )
    assert "red" in tokenizer.decode(tokenizer(TEXTS)["input_ids"][0])
    assert name in {file.name for file in setting_files(tmp_path)}


def write_phobert(folder: Path) -> None:
    (folder / "vocab.txt").write_text("red 5\nhouse 4\nblue 3\n")
    (folder / "bpe.codes").write_text("r e 3\nre d</w> 3\n")
    write_config(folder, "roberta", "PhobertTokenizer")


def test_tokenizers_without_a_fast_version(tmp_path: Path) -> None:
    write_phobert(tmp_path)
    tokenizer = open_tokenizer(tmp_path, ("vocab.json", "merges.txt"), 1000, "texts need")
    assert not tokenizer.is_fast
    assert (
        tokenizer(TEXTS)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"]
    )
    assert {file.name for file in setting_files(tmp_path)} >= {"vocab.txt", "bpe.codes"}
    (tmp_path / "bpe.codes").unlink()
    with pytest.raises(RecipeError, match="need the base's tokenizer"):
        open_tokenizer(tmp_path, ("vocab.json", "merges.txt"), 1000, "texts need")


def test_tokenizers_of_bytes_have_no_files(tmp_path: Path) -> None:
    write_config(tmp_path, "t5", "ByT5Tokenizer")
    tokenizer = open_tokenizer(tmp_path, ("spiece.model",), 384, "texts need")
    assert tokenizer.decode(tokenizer("héllo")["input_ids"], skip_special_tokens=True) == "héllo"


@pytest.mark.parametrize(
    ("model_type", "files", "others"),
    [
        ("bert", ("vocab.txt",), {}),
        ("bert", ("vocab.txt",), {"tokenizer_config.json": "{}"}),
        ("llama", ("tokenizer.json",), {}),
        ("clip", ("vocab.json", "merges.txt"), {"vocab.json": '{"a": 0, "<|endoftext|>": 1}'}),
        ("bert", ("vocab.txt",), {"spm.model": "not of BERT"}),
    ],
)
def test_no_tokenizer_is_made_up(
    tmp_path: Path, model_type: str, files: tuple[str, ...], others: dict[str, str]
) -> None:
    write_config(tmp_path, model_type)
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError) as caught:
        open_tokenizer(tmp_path, files, 1000, "texts need")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: texts need the base's tokenizer: tokenizer.json, or ")
    assert "tokenizer.json, or tokenizer.json" not in message


def test_a_tokenizer_longer_than_the_embedding_names_the_tokens(tmp_path: Path) -> None:
    models = build_tiny_text(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(models.base)
    tokenizer.add_tokens(["<new>", "<other>"])
    tokenizer.save_pretrained(models.base)
    with pytest.raises(MismatchError) as caught:
        preflight(load_recipe(models.recipe))
    text = str(caught.value)
    assert (
        "the tokenizer has 17 tokens, the model 15: it has no embedding for '<new>' (15), '<other>'"
        in text
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_text_generation_with_a_sentencepiece_model(tmp_path: Path, kind: str) -> None:
    """From the base to the merged folder."""
    models = build_tiny_text_generators(tmp_path, TEXT_GENERATORS[kind])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (models.base / name).unlink()
    name = "spiece.model" if kind == "t5" else "tokenizer.model"
    write_sentencepiece(models.base / name, "unigram" if kind == "t5" else "bpe")
    for folder in (models.base, models.expert("first"), models.expert("second")):
        larger = models.load(folder)
        larger.resize_token_embeddings(200)
        larger.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    recipe = load_recipe(models.recipe)
    preflight(recipe)
    merge(recipe, tmp_path / "merged")
    family = family_of(tmp_path / "merged")
    assert isinstance(family, TextGenerationFamily)
    ids, _ = family.prompts(tmp_path / "merged", ["red house"])
    assert "red house" in family.decode(tmp_path / "merged", ids)[0]


@pytest.mark.parametrize(
    ("kind", "model", "size"),
    [
        ("bert", AutoModelForSequenceClassification, 15),
        ("llama", AutoModelForCausalLM, 19),
        ("qwen2", AutoModelForCausalLM, 110),
        ("t5", AutoModelForSeq2SeqLM, 19),
    ],
)
@pytest.mark.parametrize("more", [2, -1])
def test_an_expert_with_another_vocabulary_is_one_sentence(
    tmp_path: Path, kind: str, model: type, size: int, more: int
) -> None:
    if kind == "bert":
        models, task = build_tiny_text(tmp_path), "tone"
    else:
        models, task = build_tiny_text_generators(tmp_path, TEXT_GENERATORS[kind]), "first"  # type: ignore[assignment]
    expert = model.from_pretrained(models.expert(task))  # type: ignore[attr-defined]
    expert.resize_token_embeddings(size + more)
    expert.save_pretrained(models.expert(task))
    with pytest.raises(MismatchError) as caught:
        preflight(load_recipe(models.recipe))
    assert str(caught.value).startswith(
        f"the recipe's inputs: expert {task!r}: its vocabulary has {size + more} tokens, the "
        f"base's has {size}, and only models with the same tokens can be merged: resize its "
    )
    assert len(caught.value.problems) == 1
