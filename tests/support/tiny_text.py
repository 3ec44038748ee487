"""A tiny random BERT, two experts, a WordPiece tokenizer and texts, in the layout users have."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from tiny_folder import TinyFolder
from transformers import BertConfig, BertForSequenceClassification, BertModel

WIDTH, LAYERS, POSITIONS = 32, 2, 24
WORDS = ("red", "green", "blue", "house", "tree", "river", "runs", "sleeps", "sings", "##s")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Task to its number of classes.
TEXT_TASKS = {"topic": 3, "tone": 2}


class TinyText(TinyFolder):
    """Where the tiny models and texts are."""


def build_tiny_text(folder: Path) -> TinyText:
    """Write base, experts, texts (JSON lines and CSV) and recipe into an existing folder."""
    _write_models(folder)
    rng = np.random.default_rng(0)
    tasks = {}
    for task, classes in TEXT_TASKS.items():
        data = folder / "data" / task
        data.mkdir(parents=True)
        _write_json(data / "calibration.jsonl", _rows(24, classes, rng))
        _write_csv(data / "test.csv", _rows(15, classes, rng))
        tasks[task] = {
            "expert": f"experts/{task}",
            "calibration": {"path": f"data/{task}/calibration.jsonl"},
            "evaluation": {"path": f"data/{task}/test.csv"},
        }
    recipe = {
        "base": {"path": "base"},
        "tasks": tasks,
        "quantize": {
            "method": "epmq",
            "effort": "fast",
            "group_size": 16,
            "samples": 24,
            "batch_size": 8,
        },
        "eval": {"latency_runs": 2, "batch_size": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return TinyText(folder)


def write_tokenizer(folder: Path) -> None:
    """A lower-casing WordPiece tokenizer as its vocabulary and settings."""
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_models(folder: Path) -> None:
    shape = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
    }
    torch.manual_seed(0)
    base = BertModel(BertConfig(**shape))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            # Fresh weights are so small that every text would get the same embedding.
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(6)
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for task, classes in TEXT_TASKS.items():
        expert = BertForSequenceClassification(BertConfig(**shape, num_labels=classes))
        expert.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in expert.bert.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(0.02))
            expert.classifier.weight.normal_()
            expert.classifier.bias.normal_(std=0.1)
        expert.save_pretrained(folder / "experts" / task)


def _rows(count: int, classes: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Texts of 1 to 30 words, so that batches are padded and some texts are cut."""
    words = WORDS[:-1]
    return [
        (" ".join(rng.choice(words, size=rng.integers(1, 31))), index % classes)
        for index in range(count)
    ]


def _write_json(file: Path, rows: list[tuple[str, int]]) -> None:
    lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
    file.write_text("\n".join(lines) + "\n")


def _write_csv(file: Path, rows: list[tuple[str, int]]) -> None:
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
