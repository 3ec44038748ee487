"""Tiny random text-generation models, two experts of each, a tokenizer and data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tiny_folder import TinyFolder
from tiny_text import WORDS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

TOKENS = ("[PAD]", "[END]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "yes", "no", "maybe", ":")
BYTE_PAIRS = 110
# Task to its answers.
TEXT_TASKS = {"first": ("yes", "no", "maybe maybe"), "second": ("red", "blue tree")}
T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """One architecture to build tiny models of.

    Attributes:
        model_type: as in ``config.json``.
        settings: of its config.
    """

    model_type: str
    settings: Mapping[str, Any]


TEXT_GENERATORS = {
    "t5": Architecture("t5", T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    # As FLAN-T5: gated, with an output layer of its own; and fewer decoder blocks than encoder's.
    "flan-t5": Architecture(
        "t5",
        T5
        | {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "num_layers": 3,
            "num_decoder_layers": 2,
        },
    ),
    "llama": Architecture("llama", DECODER | {"tie_word_embeddings": False}),
    "qwen2": Architecture("qwen2", DECODER | {"tie_word_embeddings": True}),
    "qwen3": Architecture("qwen3", DECODER | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": Architecture(
        "mistral", DECODER | {"sliding_window": None, "tie_word_embeddings": False}
    ),
}


@dataclass(frozen=True)
class TinyTextGenerators(TinyFolder):
    """Where the tiny models and data of one architecture are."""

    architecture: Architecture

    def load(self, folder: Path) -> Any:
        """A folder's model as ``transformers`` loads it."""
        return model_class(self.architecture).from_pretrained(folder).eval()


def model_class(architecture: Architecture) -> Any:
    """The auto class of its models."""
    return AutoModelForSeq2SeqLM if architecture.model_type == "t5" else AutoModelForCausalLM


def build_tiny_text_generators(
    folder: Path, architecture: Architecture, **settings: Any
) -> TinyTextGenerators:
    """Write base, experts, data and recipe into an existing folder.

    Args:
        folder: that exists.
        architecture: what to build.
        settings: of the config, instead of the architecture's.
    """
    made = TinyTextGenerators(
        folder, replace(architecture, settings={**architecture.settings, **settings})
    )
    _write_models(made)
    write_tokenizer(made.base, architecture.model_type)
    rng = np.random.default_rng(0)
    tasks = {}
    for task, answers in TEXT_TASKS.items():
        tasks[task] = {
            "expert": f"experts/{task}",
            "prompt": {"template": f"{task} : {{text}} {{more}} :", "answers": list(answers)},
            "calibration": {"path": _write_data(folder, f"{task}-calibration", 16, answers, rng)},
            "evaluation": {"path": _write_data(folder, f"{task}-test", 11, answers, rng)},
        }
    recipe = {
        "base": {"path": "base"},
        "tasks": tasks,
        "quantize": {
            "method": "epmq",
            "effort": "fast",
            "group_size": 16,
            "samples": 16,
            "batch_size": 8,
        },
        "eval": {"latency_runs": 1, "batch_size": 4},
    }
    made.recipe.write_text(yaml.safe_dump(recipe))
    return made


def _write_models(made: TinyTextGenerators) -> None:
    torch.manual_seed(0)
    settings = dict(made.architecture.settings) | {
        "vocab_size": BYTE_PAIRS if made.architecture.model_type == "qwen2" else len(TOKENS),
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(made.architecture.model_type, **settings)
    base = model_class(made.architecture).from_config(config)
    separate = not made.architecture.settings["tie_word_embeddings"]
    with torch.no_grad():
        if separate:
            weight = base.get_input_embeddings().weight
            base.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(weight))
        for name, parameter in base.named_parameters():
            # Fresh weights are so small, or so large, that all texts would be answered alike.
            if parameter.dim() == 2:
                parameter.normal_(std=0.6 if "embed" in name or "shared" in name else 0.25)
            elif "bias" in name:
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.7, 1.3)
    base.config.save_pretrained(made.base)
    file = made.base / "config.json"
    told = json.loads(file.read_text()) | {"tie_word_embeddings": not separate}
    file.write_text(json.dumps(told))
    _save(base, made.base, once=True)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    for task in TEXT_TASKS:
        base.load_state_dict(start)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter) * parameter.std())
        made.expert(task).mkdir(parents=True)
        (made.expert(task) / "config.json").write_text(file.read_text())
        _save(base, made.expert(task), once=task == "first")


def _save(model: Any, folder: Path, *, once: bool) -> None:
    """Tied weights once, as they are saved today, or under each of their names, as they were."""
    places: dict[int, str] = {}
    for name, value in model.state_dict().items():
        places.setdefault(value.data_ptr(), name)
    kept = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not once or places[value.data_ptr()] == name
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, model_type: str) -> None:
    """Whole words; no special tokens are added to a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(TOKENS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if model_type == "qwen2":
        # Whatever the files say, transformers takes Qwen2's own kind: pairs of bytes.
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=BYTE_PAIRS, special_tokens=list(TOKENS[:3]), show_progress=False
        )
        core.train_from_iterator([*TOKENS[5:], *(f" {word}" for word in TOKENS[5:])], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        eos_token="[END]",
        unk_token="[UNK]",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def _write_data(
    folder: Path, name: str, count: int, answers: tuple[str, ...], rng: np.random.Generator
) -> str:
    """Texts of 1 to 8 words, so that batches are padded and some texts are cut."""

    def words() -> str:
        return " ".join(rng.choice(WORDS[:-1], size=rng.integers(1, 9)))

    rows = (
        {"text": words(), "more": words(), "label": index % len(answers)} for index in range(count)
    )
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return f"{name}.jsonl"
