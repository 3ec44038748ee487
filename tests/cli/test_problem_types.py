"""Tasks with a value or any number of labels beside one on classes, against ``transformers``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import run
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef
from tiny_folder import copied
from tiny_text import WORDS, TinyText
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from epmq_deploy import load
from epmq_deploy.runtime.inference.classifier import LabelSet, Prediction, Value

RNG = np.random.default_rng(5)
TEXTS = [" ".join(RNG.choice(WORDS[:-1], 4 + index % 10)) for index in range(48)]
SCORES = RNG.uniform(0, 5, len(TEXTS)).round(1)
TOPICS = ("sport", "politics", "economy")
LABELS = RNG.integers(0, 2, (len(TEXTS), len(TOPICS)))


def add_expert(folder: Path, name: str, **settings: Any) -> None:
    """A fine-tune of the base with another kind of head."""
    config = AutoConfig.from_pretrained(folder / "base", architectures=[], **settings)
    expert = AutoModelForSequenceClassification.from_config(config)
    donor = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / "topic")
    expert.bert.load_state_dict(donor.bert.state_dict())
    with torch.no_grad():
        expert.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))
        tokens = AutoTokenizer.from_pretrained(folder / "base")(
            TEXTS, padding=True, truncation=True, return_tensors="pt"
        )
        expert.classifier.bias.sub_(expert(**tokens).logits.mean(0))
    expert.save_pretrained(folder / "experts" / name)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines with the texts; return the file's name."""
    lines = ({"text": text} | row for text, row in zip(TEXTS, rows, strict=True))
    file.write_text("\n".join(map(json.dumps, lines)))
    return file.name


@pytest.fixture(scope="module")
def chain(tiny_text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four commands with three kinds of heads, and predictions that are compared."""
    folder = tmp_path_factory.mktemp("problems") / "models"
    recipe = copied(tiny_text, folder)
    add_expert(folder, "similarity", num_labels=1)
    add_expert(
        folder,
        "tags",
        num_labels=3,
        id2label=dict(enumerate(TOPICS)),
        label2id={name: number for number, name in enumerate(TOPICS)},
        problem_type="multi_label_classification",
    )
    content = yaml.safe_load(recipe.read_text())
    values = write_rows(folder / "values.jsonl", [{"label": float(score)} for score in SCORES])
    # In another order than the head's.
    columns = ["economy", "sport", "politics"]
    flags = [{name: int(row[TOPICS.index(name)]) for name in columns} for row in LABELS]
    sets = [{"label": [TOPICS[i] for i in np.flatnonzero(row)]} for row in LABELS]
    content["tasks"] = {
        "tone": content["tasks"]["tone"] | {"metric": ["matthews_correlation", "f1", "accuracy"]},
        "similarity": {
            "expert": "experts/similarity",
            "calibration": {"path": values},
            "evaluation": {"path": values},
        },
        "tags": {
            "expert": "experts/tags",
            "calibration": {"path": write_rows(folder / "sets.jsonl", sets)},
            "evaluation": {
                "path": write_rows(folder / "flags.jsonl", flags),
                "label_columns": columns,
            },
        },
    }
    content["merge"] = {"search": True, "search_objective": "labels"}
    content["quantize"] |= {"anchor": "auto", "distill": 1}
    content["export"] = {"formats": ["qdq"]}
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", folder / "out", "--quiet") == 0
    return folder


def expert_logits(folder: Path, name: str, texts: list[str]) -> np.ndarray:
    """Logits of an expert, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / name)
    with torch.inference_mode():
        rows = [
            model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts
        ]
    return torch.cat(rows).numpy()


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """The experts' scores by task and metric."""
    rows = json.loads((folder / "out" / "exported" / "eval.json").read_text())["rows"]
    experts = next(row for row in rows if row["name"] == "experts")
    assert experts["accuracy"] == {
        task: next(iter(scores.values())) for task, scores in experts["metrics"].items()
    }
    scores: dict[str, dict[str, float]] = experts["metrics"]
    return scores


def test_values_are_scored_by_both_correlations(chain: Path) -> None:
    expected = expert_logits(chain, "similarity", TEXTS)[:, 0]
    assert measured(chain)["similarity"] == pytest.approx(
        {
            "spearmanr": 100 * spearmanr(expected, SCORES).statistic,
            "pearsonr": 100 * pearsonr(expected, SCORES).statistic,
        },
        abs=1e-3,
    )


def test_label_sets_are_matched_by_name_and_scored_as_scikit_learn_does(chain: Path) -> None:
    logits = expert_logits(chain, "tags", TEXTS)
    assert measured(chain)["tags"] == pytest.approx(
        {
            "micro_f1": 100 * f1_score(LABELS, logits > 0, average="micro"),
            "macro_f1": 100 * f1_score(LABELS, logits > 0, average="macro"),
            "mean_average_precision": 100 * average_precision_score(LABELS, logits),
        },
        abs=1e-3,
    )


def test_the_first_metric_asked_for_is_the_score_and_others_stand_beside_it(chain: Path) -> None:
    lines = (chain / "data" / "tone" / "test.csv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.rsplit(",", 1) for line in lines), strict=True)
    truth = np.array(labels, dtype=int)
    predicted = expert_logits(chain, "tone", list(texts)).argmax(1)
    assert measured(chain)["tone"] == pytest.approx(
        {
            "matthews_correlation": 100 * matthews_corrcoef(truth, predicted),
            "f1": 100 * f1_score(truth, predicted),
            "accuracy": 100 * (truth == predicted).mean(),
        }
    )
    card = (chain / "out" / "exported" / "eval.md").read_text()
    assert "| tone, accuracy |" in card
    assert "| similarity, pearsonr |" in card


def test_applications_get_what_each_head_means(chain: Path) -> None:
    answer = load(chain / "out" / "exported", format="fp32").predict("red house sings")
    tone, tags, similarity = answer["tone"], answer["tags"], answer["similarity"]
    assert isinstance(tone, Prediction)
    assert isinstance(tags, LabelSet)
    assert isinstance(similarity, Value)
    assert tags.names == TOPICS
    assert tags.labels == tuple(
        name for name, score in zip(TOPICS, tags.scores, strict=True) if score > 0.5
    )
    assert np.isfinite(similarity.value)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("tone", {"metric": "pearsonr"}, "metric pearsonr does not fit single_label_class"),
        ("similarity", {"metric": "accuracy"}, "choose from spearmanr, pearsonr"),
        ("tags", {"metric": "f1"}, "metric f1 does not fit multi_label_classification"),
        (
            "similarity",
            {"head": {"from_expert": True, "problem_type": "single_label_classification"}},
            "a single logit, which cannot tell classes apart",
        ),
        (
            "tags",
            {"head": {"from_expert": True, "problem_type": "regression"}},
            "its head gives 3 values at once",
        ),
        (
            "tags",
            {"head": {"from_expert": True, "problem_type": "single_label_classification"}},
            "label_columns is for multi_label_classification",
        ),
        ("tone", {"evaluation": {"path": "sets.jsonl"}}, "row 0 holds ["),
        ("similarity", {"evaluation": {"path": "sets.jsonl"}}, "must hold numbers for a regr"),
        ("tags", {"evaluation": {"path": "values.jsonl"}}, "must hold a list of labels"),
        (
            "tags",
            {"evaluation": {"path": "flags.jsonl", "label_columns": ["sport", "weather"]}},
            "no column 'weather'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    chain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    content = yaml.safe_load((chain / "recipe.yaml").read_text())
    content["tasks"][task] |= changes
    recipe = chain / f"{tmp_path.name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["fisher", "adamerging"])
def test_merge_methods_that_read_predictions(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    code = run("merge", chain / "recipe.yaml", "-o", tmp_path / "m", "--method", method)
    if method == "fisher":
        assert code == 0
    else:
        assert code != 0
        assert "'similarity' has a regression head" in " ".join(capsys.readouterr().err.split())
