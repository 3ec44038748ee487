"""Experts whose own tokenizer or processor makes other inputs than the base's."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_text import build_tiny_text
from tiny_zoo import build_tiny_zoo
from transformers import AutoTokenizer

from epmq_deploy.merging.stage import merge
from epmq_deploy.models import family_of
from epmq_deploy.models.input_settings import input_differences
from epmq_deploy.recipe import load_recipe

IMAGES, TEXTS = "preprocessor_config.json", ("vocab.txt", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({}, []),
        ({"image_processor_type": "CLIPImageProcessor", "note": "x"}, []),
        (
            {"image_mean": [0.48, 0.46, 0.41]},
            ["image_mean [0.48, 0.46, 0.41] (the base's: [0.5, 0.5, 0.5])"],
        ),
        (
            {"image_std": [0.2, 0.2, 0.2]},
            ["image_std [0.2, 0.2, 0.2] (the base's: [0.5, 0.5, 0.5])"],
        ),
        ({"resample": 2}, ["resample 2 (the base's: 3)"]),
        ({"do_normalize": False}, ["do_normalize False (the base's: True)"]),
        # Nothing is normalized with it.
        ({"rescale_factor": 1 / 255}, []),
    ],
)
def test_image_processors(tmp_path: Path, change: dict[str, Any], differences: list[str]) -> None:
    models = build_tiny_zoo(tmp_path)
    settings = json.loads((models.base / IMAGES).read_text())
    expert = models.expert("red")
    (expert / IMAGES).write_text(json.dumps(settings | change))
    assert input_differences(family_of(models.base), models.base, expert) == differences


def test_sizes_of_images(tmp_path: Path) -> None:
    models = build_tiny_zoo(tmp_path)
    settings = json.loads((models.base / IMAGES).read_text())
    expert = models.expert("red")
    changed = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    (expert / IMAGES).write_text(json.dumps(settings | changed))
    first, second = input_differences(family_of(models.base), models.base, expert)
    assert first.startswith("size ")
    assert second.startswith("crop_size ")


def test_experts_without_settings_of_their_own_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for build, name in ((build_tiny_zoo, "zoo"), (build_tiny_text, "text")):
        (tmp_path / name).mkdir()
        models = build(tmp_path / name)
        with caplog.at_level(logging.WARNING):
            merge(load_recipe(models.recipe), tmp_path / name / "merged")
    assert not [text for text in caplog.messages if "fine-tuned with another" in text]


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ("none", []),
        ("fast", []),
        ("vocabulary", ["another vocabulary"]),
        ("case", ["texts cut into other tokens"]),
        ("length", ["model_max_length 12 (the base's: 16)"]),
        ("damaged", []),
    ],
)
def test_tokenizers(tmp_path: Path, change: str, differences: list[str]) -> None:
    models = build_tiny_text(tmp_path)
    expert = models.expert("tone")
    for name in TEXTS:
        shutil.copyfile(models.base / name, expert / name)
    settings = json.loads((expert / TEXTS[1]).read_text())
    if change == "fast":
        for name in TEXTS:
            (expert / name).unlink()
        AutoTokenizer.from_pretrained(models.base).save_pretrained(expert)
    elif change == "vocabulary":
        words = (expert / "vocab.txt").read_text().split()
        words[-3], words[-4] = words[-4], words[-3]
        (expert / "vocab.txt").write_text("\n".join(words) + "\n")
    elif change == "case":
        for folder in (models.base, expert):
            words = (folder / "vocab.txt").read_text().replace("red\n", "the\n")
            (folder / "vocab.txt").write_text(words)
        (expert / TEXTS[1]).write_text(json.dumps(settings | {"do_lower_case": False}))
    elif change == "length":
        (expert / TEXTS[1]).write_text(json.dumps(settings | {"model_max_length": 12}))
    elif change == "damaged":
        (expert / TEXTS[1]).write_text("{")
    assert input_differences(family_of(models.base), models.base, expert) == differences


def test_merging_says_what_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = build_tiny_zoo(tmp_path)
    settings = json.loads((models.base / IMAGES).read_text())
    changed = settings | {"image_mean": [0.4, 0.4, 0.4]}
    (models.expert("green") / IMAGES).write_text(json.dumps(changed))
    with caplog.at_level(logging.WARNING):
        merge(load_recipe(models.recipe), tmp_path / "merged")
    (message,) = [text for text in caplog.messages if "fine-tuned with another" in text]
    assert message.startswith(
        "expert 'green' was fine-tuned with another image processor: image_mean [0.4, 0.4, 0.4] "
        "(the base's: [0.5, 0.5, 0.5]); the base's is used for this task, so"
    )
    assert json.loads((tmp_path / "merged" / IMAGES).read_text()) == settings
