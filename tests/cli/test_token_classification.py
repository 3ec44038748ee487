"""Tasks that label words, next to one on whole texts, against ``transformers`` and ``seqeval``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from command_line import run
from datasets import load_dataset
from seqeval.metrics import accuracy_score, f1_score
from tiny_tags import NAMES, TAGS, add_tagger, build_tiny_tags, expert_tags, write_words
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from epmq_deploy import load
from epmq_deploy.models import family_of
from epmq_deploy.runtime.inference.classifier import Prediction
from epmq_deploy.runtime.inference.words import LabelledText

ARCHITECTURES = ("distilbert", "electra", "modernbert", "roberta")


@dataclass(frozen=True)
class Chain:
    """Tiny models and the outputs of the four commands."""

    architecture: str
    folder: Path

    @property
    def options(self) -> dict[str, bool]:
        """Of the tokenizer, as transformers' example of token classification sets them."""
        return {"add_prefix_space": True} if self.architecture == "roberta" else {}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All four commands, with everything that reads predictions."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = build_tiny_tags(folder, request.param)
    content = yaml.safe_load(recipe.read_text())
    content["merge"] = {"search": True, "search_objective": "labels"}
    content["quantize"] |= {"anchor": "auto", "distill": 1}
    content["export"] = {"formats": ["qdq"]}
    if request.param == "roberta":
        content["export"] = {"formats": ["matmulnbits", "int8-expand"]}
        content["eval"] |= {"diagnose": True}
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", folder / "out", "--quiet") == 0
    return Chain(request.param, folder)


def test_experts_are_scored_as_seqeval_does(chain: Chain) -> None:
    """On the words that are read, tags matched by name."""
    rows = load_dataset("parquet", data_files=str(chain.folder / "test.parquet"))["train"]
    names = rows.features["ner_tags"].feature.names
    said = expert_tags(
        chain.folder, chain.folder / "experts" / "entities", rows["tokens"], **chain.options
    )
    truth = [
        [names[tag] for tag in tags][: len(words)]
        for tags, words in zip(rows["ner_tags"], said, strict=True)
    ]
    assert sum(map(len, truth)) < sum(map(len, rows["tokens"])), "some words are cut off"
    report = json.loads((chain.folder / "out" / "exported" / "eval.json").read_text())
    experts = next(row for row in report["rows"] if row["name"] == "experts")
    assert experts["metrics"]["entities"] == pytest.approx(
        {
            "seqeval_f1": 100 * f1_score(truth, said),
            "accuracy": 100 * accuracy_score(truth, said),
        }
    )
    card = (chain.folder / "out" / "exported" / "README.md").read_text()
    assert "type: token-classification" in card
    assert "type: text-classification" in card


def merged_model(chain: Chain) -> Any:
    """The merged encoder under the expert's head, as ``transformers`` runs it."""
    model = AutoModelForTokenClassification.from_pretrained(chain.folder / "experts" / "entities")
    merged = chain.folder / "out" / "merged"
    state = family_of(merged).load(merged).state_dict()
    assert not model.base_model.load_state_dict(state, strict=False).unexpected_keys
    return model.eval()


def test_applications_get_the_entities_that_the_pipeline_of_transformers_finds(
    chain: Chain,
) -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(NAMES, size)) for size in (3, 5, 6)]
    tokenizer = AutoTokenizer.from_pretrained(chain.folder / "base", **chain.options)
    reference = pipeline(
        "token-classification",
        model=merged_model(chain),
        tokenizer=tokenizer,
        aggregation_strategy="first",
    )
    model = load(chain.folder / "out" / "exported", format="fp32")
    answers = model.predict_batch(texts)
    found = 0
    for text, answer in zip(texts, answers, strict=True):
        labelled = answer["entities"]
        assert isinstance(labelled, LabelledText)
        assert isinstance(answer["first"], Prediction)
        assert [span.text for span in labelled.words] == text.split()
        expected = reference(text)
        found += len(expected)
        assert [(span.label, span.start, span.stop) for span in labelled.entities] == [
            (entity["entity_group"], entity["start"], entity["end"]) for entity in expected
        ]
        assert [span.score for span in labelled.entities] == pytest.approx(
            [float(entity["score"]) for entity in expected], abs=1e-4
        )
        assert all(span.text == text[span.start : span.stop] for span in labelled.entities)
    assert found
    assert set(model.predict(texts[0], ["entities"])) == {"entities"}


def test_the_exported_graph_gives_logits_of_every_token(chain: Chain) -> None:
    model = merged_model(chain)
    family = family_of(chain.folder / "base")
    inputs = family.collate(chain.folder / "base", ["red house sings", "tree"])
    with torch.inference_mode():
        expected = model(**dict(zip(family.input_names, inputs, strict=True))).logits.numpy()
    session = onnxruntime.InferenceSession(
        chain.folder / "out" / "exported" / "onnx" / "model.onnx"
    )
    named = {name: tensor.numpy() for name, tensor in zip(family.input_names, inputs, strict=True)}
    logits, sentence = session.run(["logits_entities", "logits_first"], named)
    assert logits.shape == (2, expected.shape[1], len(TAGS))
    assert sentence.shape == (2, 3)
    # What stands at padding may be anything.
    real = named["attention_mask"] == 1
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data that nothing was run on."""
    folder = tmp_path_factory.mktemp("inputs")
    build_tiny_tags(folder, "distilbert")
    add_tagger(folder, "unnamed", [f"LABEL_{number}" for number in range(5)])
    add_tagger(folder, "words", ["NOUN", "VERB", "ADJ"])
    write_words(folder / "parts.parquet", 8, ["ADJ", "NOUN", "VERB"])
    rows = {
        "short": {"tokens": ["red", "house"], "ner_tags": ["O"]},
        "texts": {"tokens": "red house", "ner_tags": "O"},
        "other": {"tokens": ["red"], "ner_tags": ["B-ORG"]},
        "hidden": {"tokens": ["red"], "ner_tags": [-100]},
        "null": {"tokens": ["red", None], "ner_tags": ["O", "O"]},
        "words": {"words": ["red", "house"], "tags": ["O", "B-PER"]},
        "numbers": {"tokens": ["red", "house"], "tags": [0, 1]},
        "elsewhere": {"forms": ["red", "house"], "gold": ["O", "B-PER"]},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def changed(folder: Path, name: str, **changes: Any) -> Path:
    """The recipe with another task that labels words."""
    content = yaml.safe_load((folder / "recipe.yaml").read_text())
    content["tasks"]["entities"] |= changes
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"path": "short.jsonl"}}, "row 0 holds 1 labels for 2 words"),
        ({"evaluation": {"path": "texts.jsonl"}}, "expected lists of words"),
        ({"evaluation": {"path": "other.jsonl"}}, "the data: B-ORG; the head: O, B-PER"),
        ({"evaluation": {"path": "hidden.jsonl"}}, "labels no word, all are -100"),
        ({"evaluation": {"path": "null.jsonl"}}, "row 0 holds a word that is null"),
        ({"evaluation": {"path": "elsewhere.jsonl"}}, "it has forms, gold"),
        ({"evaluation": {"path": "first-test.jsonl"}}, "no column 'tokens'"),
        ({"expert": "experts/unnamed"}, "the head does not name its tags"),
        (
            {"expert": "experts/words", "metric": "seqeval_f1", "evaluation": "parts.parquet"},
            "metric seqeval_f1 is for tags like B-PER",
        ),
        ({"metric": "f1"}, "metric f1 does not fit token_classification"),
        ({"expert": "experts/first"}, "has no column 'text'"),
        (
            {"head": {"from_expert": True, "problem_type": "single_label_classification"}},
            "its head lacks pre_classifier.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    if isinstance(changes.get("evaluation"), str):
        changes = changes | {"evaluation": {"path": changes["evaluation"]}}
    recipe = changed(inputs, tmp_path.name, **changes)
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({"evaluation": {"path": "words.jsonl"}}, {"seqeval_f1", "accuracy"}),
        ({"evaluation": {"path": "numbers.jsonl"}}, {"seqeval_f1", "accuracy"}),
        (
            {
                "evaluation": {
                    "path": "elsewhere.jsonl",
                    "input_column": "forms",
                    "label_column": "gold",
                },
                "metric": "accuracy",
            },
            {"accuracy"},
        ),
        (
            {
                "expert": "experts/unnamed",
                "head": {"from_expert": True, "classes": list(TAGS)},
            },
            {"seqeval_f1", "accuracy"},
        ),
        (
            {"expert": "experts/words", "evaluation": {"path": "parts.parquet"}},
            {"accuracy", "macro_f1"},
        ),
    ],
)
def test_other_columns_names_and_kinds_of_tags(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], scores: set[str]
) -> None:
    recipe = changed(inputs, tmp_path.name, **changes)
    quick = ["--set", "quantize.method=rtn", "--quiet"]
    assert run("run", recipe, "-o", tmp_path / "out", *quick) == 0
    report = json.loads((tmp_path / "out" / "exported" / "eval.json").read_text())
    assert set(report["rows"][0]["metrics"]["entities"]) == scores


@pytest.mark.parametrize("method", ["fisher", "adamerging", "regmean"])
def test_merge_methods_that_read_data(inputs: Path, tmp_path: Path, method: str) -> None:
    recipe = inputs / "recipe.yaml"
    assert run("merge", recipe, "-o", tmp_path / "m", "--method", method, "--quiet") == 0
