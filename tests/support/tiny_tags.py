"""A task that labels words, added to tiny models of texts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value
from tiny_families import ARCHITECTURES, build_tiny_models
from tiny_text import SPECIAL, WORDS
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
    RobertaTokenizer,
)

# Of a byte-level tokenizer.
_PIECES = 320
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
# Some words have two tokens.
NAMES = tuple(f"{word}{end}" for word in WORDS[:-1] for end in ("", "s"))


def build_tiny_tags(folder: Path, architecture: str) -> Path:
    """Models with two tasks, one of texts and one of words; the recipe."""
    kind = ARCHITECTURES[architecture]
    if architecture == "roberta":
        kind = replace(kind, settings={**kind.settings, "vocab_size": _PIECES})
    tiny = build_tiny_models(folder, kind)
    _write_tokenizer(folder / "base", architecture)
    add_tagger(folder, "entities", TAGS)
    content = yaml.safe_load(tiny.recipe.read_text())
    del content["tasks"]["second"]
    content["tasks"]["entities"] = {
        "expert": "experts/entities",
        "calibration": {"path": write_words(folder / "words.parquet", 16, TAGS)},
        # In another order than the head's.
        "evaluation": {"path": write_words(folder / "test.parquet", 24, sorted(TAGS))},
    }
    tiny.recipe.write_text(yaml.safe_dump(content))
    return tiny.recipe


def add_tagger(folder: Path, name: str, tags: Sequence[str]) -> None:
    """An expert that labels words, fine-tuned from the base in a folder."""
    base = AutoModel.from_pretrained(folder / "base")
    config = AutoConfig.from_pretrained(
        folder / "base",
        id2label=dict(enumerate(tags)),
        label2id={tag: number for number, tag in enumerate(tags)},
    )
    torch.manual_seed(3)
    expert = AutoModelForTokenClassification.from_config(config)
    expert.base_model.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in expert.base_model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(0.02))
        expert.classifier.weight.normal_()
        expert.classifier.bias.normal_(std=0.5)
    expert.save_pretrained(folder / "experts" / name)


def write_words(file: Path, count: int, tags: Sequence[str]) -> str:
    """Sentences of 1 to 20 words with tags, so that some are cut; the file's name."""
    rng = np.random.default_rng(count)
    rows = [rng.choice(NAMES, rng.integers(1, 21)).tolist() for _ in range(count)]
    numbers = [rng.integers(0, len(tags), len(row)).tolist() for row in rows]
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(tags)))}
    )
    Dataset.from_dict({"tokens": rows, "ner_tags": numbers}, features=features).to_parquet(file)
    return file.name


def expert_tags(
    folder: Path, expert: Path, rows: Sequence[Sequence[str]], **options: Any
) -> list[list[str]]:
    """What an expert says of each word, as transformers' example of token classification reads it.

    Words that are cut off are missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", **options)
    model = AutoModelForTokenClassification.from_pretrained(expert).eval()
    said = []
    for words in rows:
        batch = tokenizer(
            list(words), is_split_into_words=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            best = model(**batch).logits[0].argmax(-1).tolist()
        numbers = batch.word_ids(0)
        firsts = [numbers.index(word) for word in sorted({*numbers} - {None})]
        said.append([model.config.id2label[best[token]] for token in firsts])
    return said


def _write_tokenizer(folder: Path, architecture: str) -> None:
    """The kind of tokenizer that models of the architecture have."""
    options: dict[str, Any] = {"model_max_length": 16}
    vocabulary = folder / "vocab.txt"
    if architecture == "roberta":
        core = ByteLevelBPETokenizer()
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        core.train_from_iterator([" ".join(WORDS)] * 9, _PIECES, special_tokens=names)
        core.save_model(str(folder))
        files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        RobertaTokenizer(*files, **options).save_pretrained(folder)
        return
    vocabulary.write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    options["model_input_names"] = ["input_ids", "attention_mask"]
    BertTokenizer(str(vocabulary), **options).save_pretrained(folder)
