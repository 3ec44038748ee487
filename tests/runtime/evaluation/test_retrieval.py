"""nDCG of retrieval, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score
from sklearn.metrics.pairwise import cosine_similarity

from epmq_deploy.runtime.evaluation import retrieval
from epmq_deploy.runtime.evaluation.retrieval import Ndcg, similarities

RNG = np.random.default_rng(3)
# Each of 9 queries with some of 25 passages, in no order; the last one has no relevant passage.
NUMBERS = RNG.permutation([(q, p) for q in range(9) for p in RNG.choice(25, 5, replace=False)])
PAIRS = [(f"query {q}", f"passage {p}") for q, p in NUMBERS]
GRADES = np.where(NUMBERS[:, 0] == 8, 0, RNG.integers(0, 4, len(PAIRS))).astype(float)
VECTORS = {text: RNG.normal(size=6) for pair in PAIRS for text in pair}
EMBEDDINGS = np.array([VECTORS[text] for pair in PAIRS for text in pair])


def expected() -> np.ndarray:
    """scikit-learn's score of each query, over all passages."""
    passages = list(dict.fromkeys(passage for _, passage in PAIRS))
    grades = dict(zip(PAIRS, GRADES, strict=True))
    scores = []
    for query in dict.fromkeys(query for query, _ in PAIRS):
        truth = np.array([[grades.get((query, passage), 0) for passage in passages]])
        if truth.any():
            found = cosine_similarity([VECTORS[query]], [VECTORS[name] for name in passages])
            scores.append(ndcg_score(truth, found, k=10))
    return np.array(scores)


@pytest.mark.parametrize("block", [1, 60, 2**24])
def test_it_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """However many queries are ranked at a time."""
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    score = Ndcg.of_pairs(EMBEDDINGS, PAIRS, GRADES)
    assert len(score.of_queries) == 8
    assert sorted(score.of_queries) == pytest.approx(sorted(expected()))
    assert score.percent == pytest.approx(100 * expected().mean())


def test_bootstrap_samples_are_means_over_queries() -> None:
    score = Ndcg.of_pairs(EMBEDDINGS, PAIRS, GRADES)
    counts = RNG.multinomial(8, [1 / 8] * 8, 3).astype(float)
    rows = [np.repeat(score.of_queries, row.astype(int)).mean() for row in counts]
    assert score.resampled(counts) == pytest.approx(rows)
    assert score.interval.low < score.percent < score.interval.high


def test_similarities_are_cosines() -> None:
    rows = np.diag(cosine_similarity(EMBEDDINGS[0::2], EMBEDDINGS[1::2]))
    assert similarities(EMBEDDINGS.astype(np.float32)) == pytest.approx(rows, abs=1e-6)
    assert similarities(np.zeros((2, 3))).tolist() == [0]
