"""The recipes in the repository: they are valid, and run on tiny models of their layout."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import run
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, PreTrainedTokenizerFast

from epmq_deploy.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("clip-*.yaml"))
SIZE = 16
EIGHT = {
    "sun397": 397,
    "stanford-cars": 196,
    "resisc45": 45,
    "eurosat": 10,
    "svhn": 10,
    "gtsrb": 43,
    "mnist": 10,
    "dtd": 47,
}
TWENTY = EIGHT | {
    "oxford_flowers102": 102,
    "pcam": 2,
    "fer2013": 7,
    "oxford-iiit-pet": 37,
    "stl10": 10,
    "cifar100": 100,
    "cifar10": 10,
    "food101": 101,
    "fashion_mnist": 10,
    "emnist_letters": 26,
    "kmnist": 10,
    "rendered-sst2": 2,
}
MODELS = {
    "clip-vit-b32-task-arithmetic": ("clip-vit-base-patch32", EIGHT),
    "clip-vit-b32-ties": ("clip-vit-base-patch32", EIGHT),
    "clip-vit-l14-task-arithmetic": ("clip-vit-large-patch14", TWENTY),
}
# In the order of their names, which are those of the data's folders.
SORTED = ("sun397", "resisc45", "dtd", "stl10", "food101", "oxford-iiit-pet", "fer2013", "cifar10")


def test_there_are_recipes() -> None:
    assert {file.stem for file in RECIPES} == set(MODELS)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_valid_and_name_hub_ids(file: Path) -> None:
    recipe = load_recipe(file)
    model, counts = MODELS[file.stem]
    # Safetensors of ViT-B/32 are in a pull request.
    revision = "@refs/pr/15" if model == "clip-vit-base-patch32" else ""
    assert recipe.base.path == f"openai/{model}{revision}"
    assert {name: len(task.head.classes) for name, task in recipe.tasks.items()} == counts  # type: ignore[union-attr,arg-type]
    for name, task in recipe.tasks.items():
        assert task.expert == f"tanganke/{model}_{name}"
        assert task.calibration is not None
        assert task.evaluation is not None
        assert task.calibration.path == task.evaluation.path
        assert task.calibration.split == "train"
        # Food-101 calls its test samples so.
        assert task.evaluation.split == ("validation" if name == "food101" else "test")
        classes = list(task.head.classes)  # type: ignore[union-attr,arg-type]
        assert name not in SORTED or classes == sorted(classes)


def test_recipes_for_one_model_differ_in_the_merge_only() -> None:
    contents = [
        yaml.safe_load(file.read_text()) for file in RECIPES if file.stem.startswith("clip-vit-b32")
    ]
    merges = [content.pop("merge") for content in contents]
    assert contents[0] == contents[1]
    assert [merge["method"] for merge in merges] == ["task_arithmetic", "ties"]


def test_tasks_that_recipes_share_have_the_same_classes_and_data() -> None:
    small, _, large = (yaml.safe_load(file.read_text())["tasks"] for file in RECIPES)
    for name, task in small.items():
        assert {**task, "expert": None} == {**large[name], "expert": None}


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
        classes = len(task["head"]["classes"])
        for key, count in (("calibration", 6), ("evaluation", classes)):
            pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
            rows = {
                "image": [PillowImage.fromarray(image) for image in pixels],
                "label": list(range(count)),
            }
            # PatchCamelyon's are booleans.
            kind = "bool" if classes == 2 and key == "evaluation" else "int64"
            features = Features({"image": Image(), "label": Value(kind)})
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
    assert run("run", recipe, "-o", tmp_path / "out", "--quiet", *flags) == 0
    report = json.loads((tmp_path / "out" / "exported" / "eval.json").read_text())
    assert report["samples"] == MODELS[file.stem][1]
    assert {row["name"] for row in report["rows"]} == {"experts", "fp32", "matmulnbits", "qdq"}


def test_the_bundled_recipe_shows_the_format_to_ship_on_a_cpu_last() -> None:
    recipe = load_recipe(Path(str(files("epmq_deploy") / "zoo" / "recipe.yaml")))
    assert recipe.export.formats == ("matmulnbits", "qdq", "int8-expand")
    # With fewer runs, models this small often seem equally fast where other programs run, too.
    assert recipe.eval.latency_runs >= 200
