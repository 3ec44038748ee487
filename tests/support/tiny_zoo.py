"""A tiny random CLIP with three experts and image data, in the layout users have."""

from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from safetensors.torch import save_file
from tiny_folder import TinyFolder
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

SIZE, WIDTH, FEATURES, CLASSES = 16, 32, 24, 3
TASKS = ("red", "green", "blue")


class TinyZoo(TinyFolder):
    """Where the tiny models and data are."""


def build_tiny_zoo(folder: Path) -> TinyZoo:
    """Write base, experts, data and recipe into an existing folder."""
    _write_models(folder)
    rng = np.random.default_rng(0)
    tasks = {}
    for task in TASKS:
        for split, count in (("calibration", 24), ("test", 15)):
            _write_data(folder / "data" / task / f"{split}.parquet", count, rng)
        tasks[task] = {
            "expert": f"experts/{task}",
            "calibration": {"path": f"data/{task}/calibration.parquet"},
            "evaluation": {"path": f"data/{task}/test.parquet"},
            "head": {"matrix": f"heads/{task}.safetensors"},
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
        "eval": {"latency_runs": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return TinyZoo(folder)


def _write_models(folder: Path) -> None:
    tower = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=tower | {"num_hidden_layers": 2, "image_size": SIZE, "patch_size": 8},
        text_config=tower | {"num_hidden_layers": 1, "vocab_size": 40, "eos_token_id": 39},
        projection_dim=FEATURES,
    )
    torch.manual_seed(0)
    base = CLIPModel(config)
    base.save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "do_resize": true, '
        f'"size": {{"shortest_edge": {SIZE}}}, "crop_size": {{"height": {SIZE}, "width": {SIZE}}}, '
        '"do_center_crop": true, "do_rescale": true, "rescale_factor": 0.00392156862745098, '
        '"do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], '
        '"do_convert_rgb": true, "resample": 3}'
    )
    (folder / "heads").mkdir()
    for task in TASKS:
        tower_only = CLIPVisionModel(config.vision_config)
        tower_only.load_state_dict(base.vision_model.state_dict())
        with torch.no_grad():
            for parameter in tower_only.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(0.02))
        tower_only.save_pretrained(folder / "experts" / task)
        head = torch.randn(CLASSES, FEATURES)
        save_file({"head": head}, folder / "heads" / f"{task}.safetensors")


def _write_data(file: Path, count: int, rng: np.random.Generator) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    rows = {
        "image": [PillowImage.fromarray(image) for image in pixels],
        "label": [index % CLASSES for index in range(count)],
    }
    names = [f"class {index}" for index in range(CLASSES)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    Dataset.from_dict(rows, features=features).to_parquet(file)
