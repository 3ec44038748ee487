"""Tasks whose inputs are made as their experts make them, in all four stages and applications."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import run
from datasets import load_dataset
from tiny_families import ARCHITECTURES, TinyModels, build_tiny_models
from transformers import AutoImageProcessor, AutoModelForSequenceClassification, AutoTokenizer

from epmq_deploy.artifacts.manifest import read_manifest
from epmq_deploy.errors import MismatchError, RecipeError
from epmq_deploy.merging.stage import merge
from epmq_deploy.pipeline import preflight
from epmq_deploy.quantization.stage import quantize
from epmq_deploy.recipe import load_recipe
from epmq_deploy.runtime import load

PROCESSOR, TASK = "preprocessor_config.json", "first"


def images(folder: Path, **change: Any) -> TinyModels:
    """ViTs; the first task's expert has a processor of its own, and is always right with it."""
    models = build_tiny_models(folder, ARCHITECTURES["vit"])
    settings = json.loads((models.base / PROCESSOR).read_text())
    expert = models.expert(TASK)
    (expert / PROCESSOR).write_text(json.dumps(settings | change))
    file = folder / f"{TASK}-test.parquet"
    rows = load_dataset("parquet", data_files=str(file), split="train")
    inputs = AutoImageProcessor.from_pretrained(expert)(list(rows["image"]), return_tensors="pt")
    model = models.expert_model(TASK)
    with torch.no_grad():
        # So that not all samples are of one class.
        model.classifier.bias.sub_(model(**inputs).logits.mean(0))
        predicted = model(**inputs).logits.argmax(1)
    model.save_pretrained(expert)
    columns = {"image": list(rows["image"]), "label": predicted.tolist()}
    type(rows).from_dict(columns, features=rows.features).to_parquet(file)
    return models


def texts(folder: Path, length: int) -> TinyModels:
    """BERTs; the first task's expert has a shorter maximum length, and is always right with it."""
    models = build_tiny_models(folder, ARCHITECTURES["distilbert"])
    expert, file = models.expert(TASK), folder / f"{TASK}-test.jsonl"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(models.base / name, expert / name)
    settings = json.loads((expert / "tokenizer_config.json").read_text())
    (expert / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": length})
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(expert)
    batch = AutoTokenizer.from_pretrained(expert)(
        [row["text"] for row in rows], truncation=True, padding=True, return_tensors="pt"
    )
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        model.classifier.bias.sub_(model(**batch).logits.mean(0))
        predicted = model(**batch).logits.argmax(1).tolist()
    model.save_pretrained(expert)
    lines = [json.dumps(row | {"label": label}) for row, label in zip(rows, predicted, strict=True)]
    file.write_text("\n".join(lines) + "\n")
    return models


def choose(models: TinyModels, source: str = "expert") -> Path:
    """Set the first task's ``inputs_from``; the recipe."""
    content = yaml.safe_load(models.recipe.read_text())
    content["tasks"][TASK]["inputs_from"] = source
    models.recipe.write_text(yaml.safe_dump(content))
    return models.recipe


def rows_of(out: Path) -> dict[str, float]:
    """Return the first task's accuracy by model."""
    report = json.loads((out / "exported" / "eval.json").read_text())
    return {row["name"]: row["accuracy"][TASK] for row in report["rows"]}


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_an_expert_regains_its_accuracy_with_its_own_processor(tmp_path: Path) -> None:
    changed = {"image_mean": [0.05, 0.5, 0.9], "image_std": [0.1, 1.0, 0.3], "resample": 0}
    models = images(fresh(tmp_path / "models"), **changed)
    out = tmp_path / "out"
    assert run("run", models.recipe, "-o", out / "base", "--quiet") == 0
    assert rows_of(out / "base")["experts"] < 100
    assert not (out / "base" / "exported" / "inputs").exists()
    assert run("run", choose(models), "-o", out / "expert", "--quiet") == 0
    assert rows_of(out / "expert")["experts"] == 100
    manifest = read_manifest(out / "expert" / "merged", "merge")
    first = read_manifest(out / "base" / "merged", "merge")
    assert manifest.fingerprint != first.fingerprint
    assert set(manifest.details.input_differences) == {TASK}
    assert manifest.details.input_differences == first.details.input_differences
    exported = out / "expert" / "exported"
    written = read_manifest(exported, "export")
    assert f"inputs/{TASK}/{PROCESSOR}" in written.outputs
    assert written.recipe.tasks[TASK].inputs_from == "expert"
    # Nothing but the export is needed, and every task has its own inputs.
    processors = {
        TASK: AutoImageProcessor.from_pretrained(models.expert(TASK)),
        "second": AutoImageProcessor.from_pretrained(models.base),
    }
    rows = load_dataset("parquet", data_files=str(models.folder / f"{TASK}-test.parquet"))["train"]
    shutil.move(models.folder, tmp_path / "elsewhere")
    model = load(exported, format="fp32")
    answers = model.predict_batch(list(rows["image"]))
    graph = model._graph  # type: ignore[union-attr]
    for task, processor in processors.items():
        pixels = processor(list(rows["image"]), return_tensors="pt")["pixel_values"]
        logits = torch.from_numpy(graph.run((pixels,), [f"logits_{task}"])[f"logits_{task}"])
        scores = np.stack([answer[task].scores for answer in answers])
        torch.testing.assert_close(torch.from_numpy(scores), logits.softmax(1), atol=1e-5, rtol=0)
    right = [int(a[TASK].label) == label for a, label in zip(answers, rows["label"], strict=True)]
    assert rows_of(out / "expert")["fp32"] == pytest.approx(100 * np.mean(right))


def test_an_expert_regains_its_accuracy_with_its_own_length(tmp_path: Path) -> None:
    models = texts(fresh(tmp_path / "models"), 5)
    out = tmp_path / "out"
    assert run("run", models.recipe, "-o", out / "base", "--quiet") == 0
    assert rows_of(out / "base")["experts"] < 100
    assert run("run", choose(models), "-o", out / "expert", "--quiet") == 0
    assert rows_of(out / "expert")["experts"] == 100
    long, short = "red house runs blue tree sings", "red house runs"
    answers = load(out / "expert" / "exported", format="fp32").predict_batch([long, short])
    np.testing.assert_allclose(answers[0][TASK].scores, answers[1][TASK].scores, atol=1e-6)
    assert not np.allclose(answers[0]["second"].scores, answers[1]["second"].scores, atol=1e-6)


def test_it_is_said_before_any_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = images(fresh(tmp_path / "models"), image_mean=[0.4, 0.4, 0.4])
    with caplog.at_level(logging.INFO):
        preflight(load_recipe(models.recipe))
    (warning,) = [text for text in caplog.messages if "fine-tuned with another" in text]
    assert f"set tasks.{TASK}.inputs_from: expert" in warning
    caplog.clear()
    with caplog.at_level(logging.INFO):
        preflight(load_recipe(choose(models)))
    assert not [text for text in caplog.messages if "fine-tuned with another" in text]
    assert [text for text in caplog.messages if "inputs are made with its expert's" in text]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "no preprocessor_config.json"),
        ({"size": {"height": 8, "width": 8}}, "makes 8 x 8 pixels, and the merged model takes"),
        ({"image_mean": "x"}, "cannot be used"),
    ],
)
def test_processors_that_do_not_fit_are_refused(
    tmp_path: Path, settings: dict[str, Any] | None, message: str
) -> None:
    models = build_tiny_models(fresh(tmp_path / "models"), ARCHITECTURES["vit"])
    if settings is not None:
        base = json.loads((models.base / PROCESSOR).read_text())
        (models.expert(TASK) / PROCESSOR).write_text(json.dumps(base | settings))
    recipe = load_recipe(choose(models))
    with pytest.raises(MismatchError, match=message) as caught:
        preflight(recipe)
    assert str(caught.value).count("inputs_from: expert") == 1
    with pytest.raises(MismatchError, match=message):
        merge(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["none", "moved", "added", "added elsewhere"])
def test_vocabularies_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    models = build_tiny_models(fresh(tmp_path / "models"), ARCHITECTURES["electra"])
    if change != "none":
        tokenizer = json.loads((models.base / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        if change == "moved":
            vocabulary["red"], vocabulary["tree"] = vocabulary["tree"], vocabulary["red"]
        elif change == "added":
            del vocabulary["tree"]
        else:
            vocabulary["zebra"] = vocabulary.pop("tree")
        expert = models.expert(TASK)
        (expert / "tokenizer.json").write_text(json.dumps(tokenizer))
        shutil.copyfile(models.base / "tokenizer_config.json", expert / "tokenizer_config.json")
    recipe = load_recipe(choose(models))
    if change == "added":  # the base has a token more, and all others are the same
        preflight(recipe)
        return
    message = "no tokenizer" if change == "none" else "another vocabulary"
    with pytest.raises(MismatchError, match=message):
        preflight(recipe)


def test_a_merged_model_of_another_choice_is_refused(tmp_path: Path) -> None:
    models = images(fresh(tmp_path / "models"), image_mean=[0.4, 0.4, 0.4])
    merge(load_recipe(models.recipe), tmp_path / "merged")
    with pytest.raises(RecipeError, match="was merged with inputs_from: base; merge again"):
        quantize(load_recipe(choose(models)), tmp_path / "merged", tmp_path / "quantized")


def test_text_generation_is_refused(tmp_path: Path) -> None:
    from tiny_text_generators import TEXT_GENERATORS, build_tiny_text_generators

    models = build_tiny_text_generators(tmp_path, next(iter(TEXT_GENERATORS.values())))
    content = yaml.safe_load(models.recipe.read_text())
    task = next(iter(content["tasks"]))
    content["tasks"][task]["inputs_from"] = "expert"
    models.recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(MismatchError, match="read all prompts with the base's tokenizer"):
        preflight(load_recipe(models.recipe))
