"""Tiny random models of many architectures, two experts of each and data, as users have them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tiny_architectures import ARCHITECTURES, SIZE, TEXT, VISION, Architecture
from tiny_folder import TinyFolder
from tiny_text import SPECIAL, WORDS
from tiny_text_generators import write_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

__all__ = ["ARCHITECTURES", "TEXT", "VISION", "TinyModels", "build_tiny_models"]

# Task to its number of classes.
FAMILY_TASKS = {"first": 3, "second": 2}
PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}},
    # As old files name it.
    "deit": {"feature_extractor_type": "ViTFeatureExtractor", "size": SIZE},
    # Smaller images than the position embeddings are for, as published DINOv2 models take them.
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 18},
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True,
    },
}


@dataclass(frozen=True)
class TinyModels(TinyFolder):
    """Where the tiny models and data of one architecture are."""

    architecture: Architecture

    def expert_model(self, task: str) -> Any:
        """The expert as ``transformers`` loads it."""
        return self.classifier_class.from_pretrained(self.expert(task)).eval()

    @property
    def classifier_class(self) -> Any:
        """The auto class experts are saved from."""
        if self.architecture.processor is None:
            return AutoModelForSequenceClassification
        return AutoModelForImageClassification


def build_tiny_models(folder: Path, architecture: Architecture) -> TinyModels:
    """Write base, experts, data and recipe into an existing folder."""
    made = TinyModels(folder, architecture)
    _write_models(made)
    if architecture.model_type == "qwen2":
        write_tokenizer(made.base, architecture.model_type)
    elif architecture.processor is None:
        write_word_tokenizer(made.base, architecture.settings.get("pad_token_id", 0))
    else:
        settings = {"do_resize": True, "do_rescale": True, "do_normalize": True}
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        settings |= PROCESSORS[architecture.processor]
        (made.base / "preprocessor_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    tasks = {}
    for task, classes in FAMILY_TASKS.items():
        write = _write_texts if architecture.processor is None else _write_images
        tasks[task] = {
            "expert": f"experts/{task}",
            "calibration": {"path": write(folder, f"{task}-calibration", 16, classes, rng)},
            "evaluation": {"path": write(folder, f"{task}-test", 11, classes, rng)},
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


def _write_models(made: TinyModels) -> None:
    kind, settings = made.architecture.model_type, dict(made.architecture.settings)
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            # Fresh weights are so small that every sample would get the same embedding.
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(6)
            elif "token" in name or "position" in name:
                parameter.normal_(std=0.2)
    base.save_pretrained(made.base)
    for task, classes in FAMILY_TASKS.items():
        config = AutoConfig.for_model(kind, **settings, num_labels=classes, architectures=[])
        expert = made.classifier_class.from_config(config)
        expert.base_model.load_state_dict(base.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in expert.base_model.parameters():
                noise = torch.randn_like(parameter) * parameter.std().nan_to_num(0.02)
                parameter.add_(0.3 * noise)
            for name, parameter in expert.named_parameters():
                if not name.startswith(expert.base_model_prefix):
                    parameter.normal_(std=0.3)
        expert.save_pretrained(made.expert(task))


def write_word_tokenizer(folder: Path, padding: int) -> None:
    """A tokenizer of whole words as ``tokenizer.json``; ``padding`` is the padding token's id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL)
    special.insert(padding, special.pop(special.index("[PAD]")))
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=pairs
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def _write_texts(
    folder: Path, name: str, count: int, classes: int, rng: np.random.Generator
) -> str:
    """Texts of 1 to 20 words, so that batches are padded and some texts are cut."""
    words = WORDS[:-1]
    rows = (
        {"text": " ".join(rng.choice(words, size=rng.integers(1, 21))), "label": index % classes}
        for index in range(count)
    )
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return f"{name}.jsonl"


def _write_images(
    folder: Path, name: str, count: int, classes: int, rng: np.random.Generator
) -> str:
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PillowImage

    pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    rows = {
        "image": [PillowImage.fromarray(image) for image in pixels],
        "label": [index % classes for index in range(count)],
    }
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return f"{name}.parquet"
