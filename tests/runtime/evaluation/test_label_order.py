"""Experts and data that number the same classes differently."""

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny_folder import copied
from tiny_text import TinyText
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.heads import head_classes, head_of_expert
from epmq_deploy.errors import MismatchError
from epmq_deploy.models import family_of
from epmq_deploy.recipe import Recipe, load_recipe
from epmq_deploy.runtime.evaluation.data import evaluation_samples

EXPERT_ORDER = ["sport", "politics", "economy"]
DATA_ORDER = ["economy", "sport", "politics"]


def recipe_with_names(
    tiny_text: TinyText, folder: Path, expert: list[str], data: list[str] | None
) -> Recipe:
    """One task whose labels are what its expert predicts, numbered in the data's own order."""
    recipe = load_recipe(copied(tiny_text, folder))
    settings = folder / "experts" / "topic" / "config.json"
    config = json.loads(settings.read_text())
    config["id2label"] = {str(number): name for number, name in enumerate(expert)}
    config["label2id"] = {name: number for number, name in enumerate(expert)}
    settings.write_text(json.dumps(config))
    texts = ["red house", "tree", "blue river runs", "sings", "green", "house sleeps red"]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / "topic")
    tokens = AutoTokenizer.from_pretrained(folder / "base")(
        texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        # So that not all texts are of one class.
        model.classifier.bias.sub_(model(**tokens).logits.mean(0))
    model.save_pretrained(folder / "experts" / "topic")
    predicted = [model.config.id2label[int(n)] for n in model(**tokens).logits.argmax(1)]
    names = data or DATA_ORDER
    kind = Value("int64") if data is None else ClassLabel(names=names)
    rows = {"text": texts, "label": [names.index(name) for name in predicted]}
    file = folder / "data" / "test.parquet"
    Dataset.from_dict(rows, features=Features(text=Value("string"), label=kind)).to_parquet(file)
    task = recipe.tasks["topic"]
    assert task.evaluation is not None
    source = task.evaluation.model_copy(update={"path": str(file)})
    return recipe.model_copy(
        update={"tasks": {"topic": task.model_copy(update={"evaluation": source})}}
    )


def truth_and_predictions(recipe: Recipe) -> tuple[list[int], list[int], str]:
    """Class numbers of the samples, predictions of the expert in transformers, what was assumed."""
    task, folder = recipe.tasks["topic"], Path(recipe.base.path)
    family = family_of(folder)
    classes = head_classes(task, head_of_expert(task, family, folder))
    samples = evaluation_samples(recipe, family, folder)["topic"]
    model = AutoModelForSequenceClassification.from_pretrained(task.expert)
    with torch.no_grad():
        ids, mask, types = family.collate(folder, samples.inputs(0, len(samples)))
        logits = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    labels = samples.labels(classes)
    return labels.numbers, logits.argmax(1).tolist(), labels.assumption


def test_an_expert_that_is_always_right_scores_100_whatever_the_data_s_order(
    tiny_text: TinyText, tmp_path: Path
) -> None:
    recipe = recipe_with_names(tiny_text, tmp_path / "models", EXPERT_ORDER, DATA_ORDER)
    truth, predicted, assumption = truth_and_predictions(recipe)
    assert truth == predicted
    assert len(set(truth)) > 1
    assert assumption == ""


def test_numbers_alone_are_assumed_to_be_the_expert_s_unless_they_are_named(
    tiny_text: TinyText, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_with_names(tiny_text, tmp_path / "models", EXPERT_ORDER, None)
    with caplog.at_level("INFO", "epmq_deploy"):
        truth, predicted, assumption = truth_and_predictions(recipe)
    assert truth != predicted
    assert "0 sport, 1 politics, 2 economy" in assumption
    assert assumption in caplog.text
    task = recipe.tasks["topic"]
    assert task.evaluation is not None
    named = task.evaluation.model_copy(update={"label_names": tuple(DATA_ORDER)})
    recipe = recipe.model_copy(
        update={"tasks": {"topic": task.model_copy(update={"evaluation": named})}}
    )
    truth, predicted, assumption = truth_and_predictions(recipe)
    assert truth == predicted
    assert assumption == ""


def test_names_that_do_not_fit_are_refused_before_any_work(
    tiny_text: TinyText, tmp_path: Path
) -> None:
    recipe = recipe_with_names(tiny_text, tmp_path / "models", EXPERT_ORDER, DATA_ORDER)
    recipe = recipe.model_copy(update={"tasks": dict(recipe.tasks)})
    settings = tmp_path / "models" / "experts" / "topic" / "config.json"
    config = json.loads(settings.read_text())
    config["id2label"]["1"] = "science"
    settings.write_text(json.dumps(config))
    family = family_of(Path(recipe.base.path))
    with pytest.raises(MismatchError, match=r"economy, sport, politics; the head: sport, science"):
        evaluation_samples(recipe, family, Path(recipe.base.path))


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"0": "a", "1": "b"}},
        {"id2label": ["a", "b"]},
        {"label2id": {"b": 1, "a": 0}},
        {"id2label": {}, "label2id": {"b": "1", "a": "0"}},
    ],
)
def test_names_are_read_wherever_a_config_has_them(
    tiny_text: TinyText, tmp_path: Path, config: dict[str, object]
) -> None:
    recipe = load_recipe(copied(tiny_text, tmp_path / "models"))
    task = recipe.tasks["tone"]
    settings = Path(task.expert) / "config.json"
    content = json.loads(settings.read_text())
    content.pop("id2label", None)
    content.pop("label2id", None)
    settings.write_text(json.dumps(content | config))
    family = family_of(Path(recipe.base.path))
    head = head_of_expert(task, family, Path(recipe.base.path))
    assert head_classes(task, head) == HeadClasses(2, ("a", "b"))


@pytest.mark.parametrize("config", [{"id2label": "names"}, {"label2id": 7}])
def test_names_that_are_none_are_an_error(
    tiny_text: TinyText, tmp_path: Path, config: dict[str, object]
) -> None:
    recipe = load_recipe(copied(tiny_text, tmp_path / "models"))
    settings = Path(recipe.tasks["tone"].expert) / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    with pytest.raises(MismatchError, match=r"id2label or label2id in config\.json is no mapping"):
        evaluation_samples(recipe, family_of(Path(recipe.base.path)), Path(recipe.base.path))
