"""The recipes for classifiers and for models that embed texts: valid, and run on tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import run
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from tiny_architectures import ARCHITECTURES, SIZE
from tiny_embeddings import add_embedder
from tiny_families import build_tiny_models
from tiny_text import WORDS
from transformers import AutoConfig, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as TextClassifier

from epmq_deploy.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
GLUE = FOLDER / "roberta-base-glue-task-arithmetic.yaml"
VIT = FOLDER / "vit-b16-task-arithmetic.yaml"
MINILM = FOLDER / "minilm-embeddings-task-arithmetic.yaml"
# GLUE's classes in the data's order; None where labels are numbers.
CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
    "stsb": None,
}
RNG = np.random.default_rng(0)


def test_every_recipe_has_a_test() -> None:
    others = {"clip-", "flan-t5-"}
    names = {file.name for file in FOLDER.glob("*.yaml")}
    assert {GLUE.name, VIT.name, MINILM.name} == {
        name for name in names if not name.startswith(tuple(others))
    }


def test_glue_is_scored_as_glue_does() -> None:
    tasks = load_recipe(GLUE).tasks
    assert tasks.keys() == CLASSES.keys()
    assert {name: task.metric for name, task in tasks.items() if task.metric} == {
        "cola": ("matthews_correlation",),
        "mrpc": ("f1", "accuracy"),
        "qqp": ("f1", "accuracy"),
        "stsb": ("pearsonr", "spearmanr"),
    }
    for name, task in tasks.items():
        assert task.evaluation is not None
        assert task.evaluation.subset == name
        assert (task.text_pair is None) == (name in ("cola", "sst2"))


def classifier(folder: Path, kind: Any, name: str, classes: tuple[str, ...] | None) -> None:
    """An expert like the base, whose classes are in another order than the data's."""
    names = dict(enumerate(sorted(classes))) if classes else {0: "LABEL_0"}
    config = AutoConfig.from_pretrained(
        folder / "base", id2label=names, label2id={name: i for i, name in names.items()}
    )
    kind.from_config(config).save_pretrained(folder / "experts" / name)


def finished(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a recipe on what is in a folder; the report."""
    content["base"]["path"] = str(folder / "base")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    quick = ("quantize.samples=6", "quantize.group_size=16", "eval.latency_runs=1")
    flags = [part for option in quick for part in ("--set", option)]
    assert run("run", recipe, "-o", folder / "out", "--quiet", *flags) == 0
    report: dict[str, Any] = json.loads((folder / "out" / "exported" / "eval.json").read_text())
    assert {row["name"] for row in report["rows"]} == {"experts", "fp32", "matmulnbits", "qdq"}
    return report


def local(task: dict[str, Any], key: str, folder: Path, name: str, rows: Dataset) -> None:
    """Put a file with these rows in the place of a data set of the hub."""
    file = folder / f"{name}-{key}.parquet"
    rows.to_parquet(file)
    kept = {k: v for k, v in task[key].items() if k not in ("subset", "split")}
    task[key] = kept | {"path": str(file)}


def texts(count: int) -> list[str]:
    """Random texts."""
    return [" ".join(RNG.choice(WORDS[:-1], 4)) for _ in range(count)]


def test_glue_runs_on_local_folders_of_the_same_layout(tmp_path: Path) -> None:
    build_tiny_models(tmp_path, ARCHITECTURES["roberta"])
    content = yaml.safe_load(GLUE.read_text())
    for name, task in content["tasks"].items():
        classes = CLASSES[name]
        classifier(tmp_path, TextClassifier, name, classes)
        task["expert"] = str(tmp_path / "experts" / name)
        for key, count in (("calibration", 6), ("evaluation", 6)):
            source = task[key]
            columns = source.get("input_columns") or [source["input_column"]]
            labels = [index % len(classes) if classes else 0.8 * index for index in range(count)]
            kind = ClassLabel(names=list(classes)) if classes else Value("float32")
            rows = {column: texts(count) for column in columns} | {"label": labels}
            features = Features({**{column: Value("string") for column in columns}, "label": kind})
            local(task, key, tmp_path, name, Dataset.from_dict(rows, features=features))
    report = finished(content, tmp_path)
    assert set(report["rows"][0]["metrics"]["stsb"]) == {"pearsonr", "spearmanr"}


def test_vit_runs_on_local_folders_of_the_same_layout(tmp_path: Path) -> None:
    build_tiny_models(tmp_path, ARCHITECTURES["vit"])
    content = yaml.safe_load(VIT.read_text())
    for name, task in content["tasks"].items():
        classes = tuple(f"{name} {number}" for number in range(3))
        classifier(tmp_path, AutoModelForImageClassification, name, classes)
        task["expert"] = str(tmp_path / "experts" / name)
        for key in ("calibration", "evaluation"):
            source = task[key]
            pixels = RNG.integers(0, 256, (6, SIZE, SIZE, 3), np.uint8)
            rows = {
                source["input_column"]: [PillowImage.fromarray(image) for image in pixels],
                source["label_column"]: [index % 3 for index in range(6)],
            }
            kinds = (Image(), ClassLabel(names=list(classes)))
            features = Features(dict(zip(rows, kinds, strict=True)))
            local(task, key, tmp_path, name, Dataset.from_dict(rows, features=features))
    assert finished(content, tmp_path)["samples"] == dict.fromkeys(content["tasks"], 6)


def test_embeddings_run_on_local_folders_of_the_same_layout(tmp_path: Path) -> None:
    build_tiny_models(tmp_path, ARCHITECTURES["bert"])
    content = yaml.safe_load(MINILM.read_text())
    for name, task in content["tasks"].items():
        add_embedder(tmp_path, name)
        task["expert"] = str(tmp_path / "experts" / name)
        for key in ("calibration", "evaluation"):
            first, second = task[key]["input_columns"]
            scores = [0.1 * index for index in range(8)]
            if name == "search":
                scores = [float(index % 2) for index in range(8)]
            rows = {first: texts(8), second: texts(8), task[key]["label_column"]: scores}
            local(task, key, tmp_path, name, Dataset.from_dict(rows))
    report = finished(content, tmp_path)
    assert set(report["rows"][0]["metrics"]["search"]) == {"ndcg_at_10"}


@pytest.mark.parametrize("file", [GLUE, VIT, MINILM], ids=lambda file: file.stem)
def test_calibration_and_evaluation_are_different_splits(file: Path) -> None:
    for task in load_recipe(file).tasks.values():
        assert task.calibration is not None
        assert task.evaluation is not None
        assert task.calibration.path == task.evaluation.path
        assert task.calibration.split == "train" != task.evaluation.split
