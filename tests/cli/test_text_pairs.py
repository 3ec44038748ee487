"""Tasks on pairs of texts beside one on single texts, compared with ``transformers``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import run
from tiny_folder import copied
from tiny_text import WORDS, TinyText
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from epmq_deploy import load
from epmq_deploy.errors import MismatchError

# Longer than the tokenizer's 16 tokens together, so that some are cut.
PAIRS = [
    (" ".join(first), " ".join(second))
    for first, second in (
        (
            np.random.default_rng(index).choice(WORDS[:-1], 1 + index % 12),
            np.random.default_rng(100 + index).choice(WORDS[:-1], 1 + (7 * index) % 11),
        )
        for index in range(30)
    )
]


@pytest.fixture(scope="module")
def chain(tiny_text: TinyText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four commands; the expert for ``topic`` reads pairs."""
    folder = tmp_path_factory.mktemp("pairs") / "models"
    recipe = copied(tiny_text, folder)
    content = yaml.safe_load(recipe.read_text())
    lines = [
        json.dumps({"premise": first, "hypothesis": second, "label": index % 3})
        for index, (first, second) in enumerate(PAIRS)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    source = {"path": "pairs.jsonl", "input_columns": ["premise", "hypothesis"]}
    content["tasks"]["topic"] |= {"calibration": source, "evaluation": source}
    content["export"] = {"formats": ["qdq"]}
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", folder / "out", "--quiet") == 0
    return folder


def expected_logits(folder: Path) -> torch.Tensor:
    """Logits of the expert, pair by pair, so without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / "topic")
    rows = []
    with torch.inference_mode():
        for first, second in PAIRS:
            tokens = tokenizer(
                first, second, truncation="longest_first", max_length=16, return_tensors="pt"
            )
            assert 1 in tokens["token_type_ids"]
            rows.append(model(**tokens).logits[0])
    return torch.stack(rows)


def test_the_expert_scores_as_in_transformers(chain: Path) -> None:
    rows = json.loads((chain / "out" / "exported" / "eval.json").read_text())["rows"]
    measured = next(row["accuracy"]["topic"] for row in rows if row["name"] == "experts")
    hits = expected_logits(chain).argmax(1) == torch.arange(30) % 3
    assert measured == pytest.approx(100 * float(hits.float().mean()))


def test_applications_pass_pairs_as_tuples_or_by_column(chain: Path) -> None:
    model = load(chain / "out" / "exported", format="qdq")
    first, second = PAIRS[3]
    by_column = {"hypothesis": second, "premise": first}
    answers = [
        model.predict((first, second), ["topic"]),
        model((first, second), ["topic"]),
        model.predict(by_column, ["topic"]),
        *model([(first, second), [first, second]], ["topic"]),
    ]
    scores = [answer["topic"].scores for answer in answers]
    assert all(np.array_equal(scores[0], other) for other in scores)
    turned = model.predict((second, first), ["topic"])["topic"].scores
    assert not np.allclose(scores[0], turned)
    assert set(model.predict(first, ["tone"])) == {"tone"}


@pytest.mark.parametrize(
    ("item", "tasks", "message"),
    [
        ("red", ["topic"], "'topic' reads two texts, premise and hypothesis; give both"),
        (("red", "green"), ["tone"], "expected a str, found tuple"),
        ("red", None, "tone read one text, other tasks pairs of texts"),
        ({"premise": "red"}, ["topic"], "'topic' reads hypothesis, which is not given"),
        (("red", 3), ["topic"], "expected a str, found int"),
        (("red", "red", "red"), ["topic"], "give both"),
    ],
)
def test_inputs_of_the_other_kind_are_refused(
    chain: Path, item: object, tasks: list[str] | None, message: str
) -> None:
    model = load(chain / "out" / "exported", format="qdq")
    with pytest.raises(MismatchError, match=message):
        model.predict(item, tasks)


def test_pairs_are_asked_for_where_the_data_seem_to_hold_them(
    tiny_text: TinyText, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied(tiny_text, tmp_path / "models")
    content = yaml.safe_load(recipe.read_text())
    (tmp_path / "models" / "pairs.csv").write_text("sentence1,sentence2,label\nred,blue,0\n")
    content["tasks"]["topic"]["evaluation"] = {"path": "pairs.csv"}
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    assert "give input_columns: [sentence1, sentence2]" in " ".join(capsys.readouterr().err.split())
    content["tasks"]["topic"]["evaluation"]["input_columns"] = ["sentence1", "sentence2"]
    recipe.write_text(yaml.safe_dump(content))
    assert run("run", recipe, "-o", tmp_path / "out") == 2
    assert "must both give input_columns, or neither" in " ".join(capsys.readouterr().err.split())
