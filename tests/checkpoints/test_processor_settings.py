"""Settings of image processors, in either of the files that ``transformers`` keeps them in."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import ARCHITECTURES, build_tiny_models
from tiny_folder import TinyFolder
from tiny_zoo import build_tiny_zoo
from transformers import AutoImageProcessor, AutoTokenizer, CLIPProcessor

import epmq_deploy as epmq
from epmq_deploy.checkpoints.model_folder import ModelFolder
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.image_inputs import image_processor, pixel_values

FLAT, TOGETHER = "preprocessor_config.json", "processor_config.json"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def nest(folder: Path) -> dict[str, object]:
    """Move the settings to where transformers 5 keeps them; return them."""
    settings: dict[str, object] = json.loads((folder / FLAT).read_text())
    (folder / FLAT).unlink()
    content = {"image_processor": settings, "processor_class": "CLIPProcessor"}
    (folder / TOGETHER).write_text(json.dumps(content))
    return settings


def test_a_clip_as_transformers_saves_it(tmp_path: Path) -> None:
    zoo = build_tiny_zoo(tmp_path)
    plain = pixel_values(image_processor(zoo.base), [PHOTO])
    processor = CLIPProcessor(
        AutoImageProcessor.from_pretrained(zoo.base, backend="pil"),
        AutoTokenizer.from_pretrained(zoo.base),
    )
    saved = tmp_path / "saved"
    shutil.copytree(zoo.base, saved)
    (saved / FLAT).unlink()
    processor.save_pretrained(saved)
    assert (saved / TOGETHER).is_file()
    assert not (saved / FLAT).exists()
    assert torch.equal(pixel_values(image_processor(saved), [PHOTO]), plain)


@pytest.mark.parametrize(
    "build", [build_tiny_zoo, lambda f: build_tiny_models(f, ARCHITECTURES["vit"])]
)
def test_exports_have_the_file_that_other_programs_read(tmp_path: Path, build: object) -> None:
    assert callable(build)
    models: TinyFolder = build(tmp_path)
    settings = nest(models.base)
    merged = epmq.merge(models.recipe, tmp_path / "merged")
    quantized = epmq.quantize(merged, tmp_path / "quantized", method="rtn")
    epmq.export(quantized, tmp_path / "exported")
    for stage in ("merged", "exported"):
        assert json.loads((tmp_path / stage / FLAT).read_text()) == settings
        flat = tmp_path / f"{stage}-flat"
        flat.mkdir()
        shutil.copy(tmp_path / stage / FLAT, flat)
        pixels = pixel_values(image_processor(flat), [PHOTO])
        assert torch.equal(pixel_values(image_processor(models.base), [PHOTO]), pixels)


def test_settings_kept_together_come_first(tmp_path: Path) -> None:
    """As in transformers; what is written afterwards says the same in both files."""
    models = build_tiny_models(tmp_path, ARCHITECTURES["vit"])
    old = json.loads((models.base / FLAT).read_text())
    new = nest(models.base) | {"image_mean": [0.1, 0.2, 0.3]}
    (models.base / TOGETHER).write_text(json.dumps({"image_processor": new}))
    (models.base / FLAT).write_text(json.dumps(old))
    folder = ModelFolder.at(models.base)
    assert folder.preprocessor_config == new
    assert list(image_processor(models.base).image_mean) == [0.1, 0.2, 0.3]
    (tmp_path / "copy").mkdir()
    folder.copy_settings(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / FLAT).read_text()) == new


@pytest.mark.parametrize("content", [{}, {"processor_class": "CLIPProcessor"}])
def test_older_files_say_nothing_of_images(tmp_path: Path, content: dict[str, str]) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["vit"])
    settings = json.loads((models.base / FLAT).read_text())
    (models.base / TOGETHER).write_text(json.dumps(content))
    assert ModelFolder.at(models.base).preprocessor_config == settings
    (models.base / FLAT).unlink()
    with pytest.raises(RecipeError, match=r"preprocessor_config\.json is missing, and there is no"):
        image_processor(models.base)


def test_files_that_say_the_same_are_copied_as_they_are(tmp_path: Path) -> None:
    models = build_tiny_models(tmp_path, ARCHITECTURES["vit"])
    (tmp_path / "copy").mkdir()
    ModelFolder.at(models.base).copy_settings(tmp_path / "copy")
    assert (tmp_path / "copy" / FLAT).read_bytes() == (models.base / FLAT).read_bytes()
