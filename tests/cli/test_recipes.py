"""The recipes in the repository: they are valid, and run on tiny models of their layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, PreTrainedTokenizerFast

from epmq_deploy.cli.main import main
from epmq_deploy.recipe import load_recipe

ALL = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
RECIPES = [file for file in ALL if file.stem.startswith("clip")]
SIZE = 16
CLASSES = {"resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47}


def test_there_are_recipes() -> None:
    assert {file.stem for file in ALL} == {
        "clip-vit-b32-task-arithmetic",
        "clip-vit-b32-ties",
        "flan-t5-base-glue-task-arithmetic",
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_valid_and_name_hub_ids(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.base.path == "openai/clip-vit-base-patch32"
    assert {name: len(task.head.classes) for name, task in recipe.tasks.items()} == CLASSES  # type: ignore[union-attr,arg-type]
    for name, task in recipe.tasks.items():
        assert task.expert == f"tanganke/clip-vit-base-patch32_{name}"
        assert task.calibration is not None
        assert task.evaluation is not None
        assert task.calibration.path == task.evaluation.path
        assert (task.calibration.split, task.evaluation.split) == ("train", "test")
    # These are in the order of their names, which are those of the data's folders.
    for name in ("resisc45", "dtd"):
        classes = list(recipe.tasks[name].head.classes)  # type: ignore[union-attr,arg-type]
        assert classes == sorted(classes)


def test_recipes_differ_in_the_merge_only() -> None:
    contents = [yaml.safe_load(file.read_text()) for file in RECIPES]
    merges = [content.pop("merge") for content in contents]
    assert contents[0] == contents[1]
    assert [merge["method"] for merge in merges] == ["task_arithmetic", "ties"]


def write_models(content: dict[str, Any], folder: Path) -> None:
    """A tiny random CLIP that can tell all the recipe's prompts apart, and image towers."""
    heads = [task["head"] for task in content["tasks"].values()]
    texts = " ".join(text for head in heads for text in (*head["classes"], *head["templates"]))
    split = Whitespace()
    words = sorted({word for word, _ in split.pre_tokenize_str(texts)})
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", *words, "<end>"))}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    end = len(vocabulary) - 1
    core.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"num_hidden_layers": 1, "vocab_size": end + 1, "eos_token_id": end}
    config = CLIPConfig(
        vision_config=tower | {"num_hidden_layers": 2, "image_size": SIZE, "patch_size": 8},
        text_config=tower | text,
        projection_dim=24,
    )
    torch.manual_seed(0)
    base = CLIPModel(config)
    base.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder / "base")
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    }
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps(settings))
    content["base"]["path"] = str(folder / "base")
    for name, task in content["tasks"].items():
        expert = CLIPVisionModel(config.vision_config)
        expert.load_state_dict(base.vision_model.state_dict())
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        expert.save_pretrained(folder / "experts" / name)
        task["expert"] = str(folder / "experts" / name)


def write_data(content: dict[str, Any], folder: Path) -> None:
    """Random images, for testing one of every class."""
    rng = np.random.default_rng(0)
    for name, task in content["tasks"].items():
        for key, count in (("calibration", 6), ("evaluation", CLASSES[name])):
            pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
            rows = {
                "image": [PillowImage.fromarray(image) for image in pixels],
                "label": list(range(count)),
            }
            features = Features({"image": Image(), "label": Value("int64")})
            file = folder / f"{name}-{key}.parquet"
            Dataset.from_dict(rows, features=features).to_parquet(file)
            task[key] = {"path": str(file)}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_run_on_local_folders_of_the_same_layout(file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(file.read_text())
    write_models(content, tmp_path)
    write_data(content, tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    quick = [f"quantize.{option}" for option in ("samples=6", "refine=0", "group_size=16")]
    flags = [part for option in (*quick, "eval.latency_runs=1") for part in ("--set", option)]
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), "-o", str(tmp_path / "out"), "--quiet", *flags])
    assert not ended.value.code
    report = json.loads((tmp_path / "out" / "exported" / "eval.json").read_text())
    assert report["samples"] == CLASSES
    assert {row["name"] for row in report["rows"]} == {"experts", "fp32", "matmulnbits", "qdq"}
