"""Experts that embed texts, next to a classifier, against ``sentence-transformers``."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import run
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from tiny_embeddings import add_embedder, write_pairs
from tiny_families import ARCHITECTURES, build_tiny_models

from epmq_deploy import load
from epmq_deploy.models import family_of
from epmq_deploy.runtime.evaluation.retrieval import Ndcg
from epmq_deploy.runtime.inference.classifier import Embedding, Prediction

ROWS = 30


@pytest.fixture(scope="module", params=["distilbert", "mpnet"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four commands, with everything that reads predictions."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = build_tiny_models(folder, ARCHITECTURES[request.param])
    add_embedder(folder, "similar", "mean")
    pooling = ("cls", "max", "weightedmean", "lasttoken")
    add_embedder(folder, "search", pooling, dense=(12, 9), normalize=False, longest=9)
    write_pairs(folder / "scored.jsonl", ROWS)
    write_pairs(folder / "found.jsonl", ROWS, first="query", second="passage", score="relevance")
    content = yaml.safe_load(tiny.recipe.read_text())
    del content["tasks"]["second"]
    content["tasks"] |= {
        "similar": {
            "expert": "experts/similar",
            "calibration": {"path": "scored.jsonl"},
            "evaluation": {"path": "scored.jsonl"},
        },
        "search": {
            "expert": "experts/search",
            "calibration": {"path": "found.jsonl"},
            "evaluation": {"path": "found.jsonl"},
            "metric": "ndcg_at_10",
        },
    }
    content["merge"] = {"search": True}
    content["quantize"] |= {"anchor": "auto", "distill": 1}
    content["export"] = {"formats": ["qdq"]}
    tiny.recipe.write_text(yaml.safe_dump(content))
    assert run("run", tiny.recipe, "-o", folder / "out", "--quiet") == 0
    return folder


def measured(folder: Path, task: str) -> dict[str, float]:
    """The expert's scores by metric."""
    rows = json.loads((folder / "out" / "exported" / "eval.json").read_text())["rows"]
    scores: dict[str, float] = next(row for row in rows if row["name"] == "experts")["metrics"][
        task
    ]
    return scores


def columns(file: Path) -> list[tuple[Any, ...]]:
    """The data's columns."""
    rows = (json.loads(line) for line in file.read_text().splitlines())
    return list(zip(*(row.values() for row in rows), strict=True))


def test_similarities_are_scored_as_sentence_transformers_gives_them(chain: Path) -> None:
    first, second, scores = columns(chain / "scored.jsonl")
    expert = SentenceTransformer(str(chain / "experts" / "similar"), device="cpu")
    similar = expert.similarity_pairwise(expert.encode(first), expert.encode(second)).numpy()
    assert measured(chain, "similar") == pytest.approx(
        {
            "spearmanr": 100 * spearmanr(similar, scores).statistic,
            "pearsonr": 100 * pearsonr(similar, scores).statistic,
        },
        abs=0.05,
    )


def test_retrieval_is_scored_by_all_passages_and_their_grades(chain: Path) -> None:
    """All passages are ranked for every query; gains are the grades in the data."""
    queries, passages, relevance = columns(chain / "found.jsonl")
    expert = SentenceTransformer(str(chain / "experts" / "search"), device="cpu")
    corpus = dict.fromkeys(passages)
    assert len(corpus) > 20
    pairs = list(zip(queries, passages, strict=True))
    assert len(set(pairs)) == len(pairs)
    graded = dict(zip(pairs, relevance, strict=True))
    asked = list(dict.fromkeys(queries))
    similar = expert.similarity(expert.encode(asked), expert.encode(list(corpus)))
    expected = []
    for query, row in zip(asked, similar.numpy(), strict=True):
        grades = np.array([graded.get((query, passage), 0) for passage in corpus])
        discounts = 1 / np.log2(np.arange(10) + 2)
        best = np.sort(grades)[::-1][:10] @ discounts
        if best:
            expected.append(grades[np.argsort(-row, kind="stable")][:10] @ discounts / best)
    assert measured(chain, "search")["ndcg_at_10"] == pytest.approx(100 * np.mean(expected))


def test_where_passages_are_relevant_or_not_its_evaluator_agrees(chain: Path) -> None:
    queries, passages, _ = columns(chain / "found.jsonl")
    expert = SentenceTransformer(str(chain / "experts" / "search"), device="cpu")
    pairs = list(zip(queries, passages, strict=True))
    evaluated = InformationRetrievalEvaluator(
        queries={text: text for text in queries},
        corpus={text: text for text in passages},
        relevant_docs={text: {q for p, q in pairs if p == text} for text in queries},
        ndcg_at_k=[10],
        write_csv=False,
    )(expert)
    expected = next(value for key, value in evaluated.items() if key.endswith("cosine_ndcg@10"))
    vectors = expert.encode([text for pair in pairs for text in pair])
    score = Ndcg.of_pairs(vectors, pairs, np.ones(len(pairs)))
    assert score.percent == pytest.approx(100 * expected)


@pytest.mark.parametrize("task", ["similar", "search"])
def test_applications_get_the_embeddings_of_the_merged_model(chain: Path, task: str) -> None:
    model = SentenceTransformer(str(chain / "experts" / task), device="cpu")
    encoder = model[0].model if hasattr(model[0], "model") else model[0].auto_model
    merged = chain / "out" / "merged"
    state = family_of(merged).load(merged).state_dict()
    assert not encoder.load_state_dict(state, strict=False).unexpected_keys
    texts = ["red house sings", "tree " * 20, "river"]
    answers = load(chain / "out" / "exported", format="fp32").predict_batch(texts)
    given = [answer[task] for answer in answers]
    assert all(isinstance(embedding, Embedding) for embedding in given)
    assert isinstance(answers[0]["first"], Prediction)
    np.testing.assert_allclose(
        np.stack([embedding.vector for embedding in given]), model.encode(texts), atol=1e-4
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data that nothing was run on."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe = build_tiny_models(folder, ARCHITECTURES["distilbert"]).recipe
    add_embedder(folder, "similar", "cls")
    for name in ("plain", "strange"):
        add_embedder(folder, name)
    add_embedder(folder, "residual", dense=8)
    add_embedder(folder, "tokens", dense=8)
    for name, changes in (
        ("residual", {"use_residual": True}),
        ("tokens", {"module_input_name": "token_embeddings"}),
    ):
        file = folder / "experts" / name / "2_Dense" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (folder / "experts" / "last").mkdir()
    shutil.copytree(folder / "experts" / "similar", folder / "experts" / "last", dirs_exist_ok=True)
    file = folder / "experts" / "last" / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode": "softmax"}))
    (folder / "experts" / "plain" / "modules.json").unlink()
    file = folder / "experts" / "strange" / "modules.json"
    file.write_text(file.read_text().replace("Normalize", "LSTM"))
    write_pairs(folder / "pairs.jsonl", 12)
    rows = {
        "texts": {"text": "red house", "label": 1},
        "words": {"sentence1": "red", "sentence2": "tree", "label": "close"},
        "negative": {"query": "red", "passage": "tree", "relevance": -1},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    content = yaml.safe_load(recipe.read_text())
    source = {"path": "pairs.jsonl"}
    content["tasks"]["second"] = {
        "expert": "experts/similar",
        "calibration": source,
        "evaluation": source,
    }
    recipe.write_text(yaml.safe_dump(content))
    return folder


def changed(folder: Path, name: str, **changes: Any) -> Path:
    """The recipe with another task that embeds texts."""
    content = yaml.safe_load((folder / "recipe.yaml").read_text())
    content["tasks"]["second"] |= changes
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"path": "texts.jsonl"}}, "embeddings are evaluated on pairs of texts"),
        ({"evaluation": {"path": "words.jsonl"}}, "must hold numbers for similarities, row 0"),
        (
            {"evaluation": {"path": "negative.jsonl"}, "metric": "ndcg_at_10"},
            "relevances for metric ndcg_at_10 are 0 or more",
        ),
        (
            {"evaluation": {"path": "pairs.jsonl", "label_column": None}},
            "needs a label_column with similarities",
        ),
        ({"metric": "accuracy"}, "choose from spearmanr, pearsonr, ndcg_at_10"),
        ({"expert": "experts/last"}, "pools tokens by softmax; supported are cls, mean"),
        ({"expert": "experts/residual"}, "Dense modules with use_residual are not supported"),
        ({"expert": "experts/tokens"}, "module_input_name is 'token_embeddings'"),
        ({"expert": "experts/strange"}, "module LSTM is not supported"),
        ({"expert": "experts/plain"}, "has no head"),
        (
            {
                "expert": "experts/plain",
                "head": {"from_expert": True, "problem_type": "feature_extraction"},
            },
            "no modules.json, which says how tokens are pooled",
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
    recipe = changed(inputs, tmp_path.name, **changes)
    assert run("run", recipe, "-o", tmp_path / "out") == 3
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["fisher", "adamerging", "regmean"])
def test_merge_methods_that_read_data(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    code = run("merge", inputs / "recipe.yaml", "-o", tmp_path / "m", "--method", method)
    if method == "adamerging":
        assert code != 0
        assert "'second' has a feature_extraction head" in " ".join(capsys.readouterr().err.split())
    else:
        assert code == 0
