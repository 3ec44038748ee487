"""How well similarities rank the passages that belong to queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from epmq_deploy.runtime.evaluation.bootstrap import ResampledScore
from epmq_deploy.runtime.evaluation.significance import Floats

_DEPTH = 10
# Similarities computed at a time, which bounds memory.
_BLOCK = 2**24


@dataclass(frozen=True)
class Ndcg(ResampledScore):
    """Normalised discounted cumulative gain of the first 10 passages, mean over queries.

    Jaervelin & Kekaelaeinen, ACM Transactions on Information Systems 20, 2002; gains are the
    relevances themselves.

    Attributes:
        of_queries: of each query, ``[q]``.
    """

    of_queries: Floats

    metric = "nDCG@10 of the passages of all pairs, mean over queries, times 100"
    hub_name = "ndcg_at_10"

    @classmethod
    def of_pairs(
        cls,
        embeddings: npt.NDArray[Any],
        pairs: Sequence[tuple[str, str]],
        relevance: Floats,
    ) -> Self:
        """Rank all passages for every query.

        Queries without a relevant passage do not count. Of equal similarities, the passage that
        comes first in the data is first.

        Args:
            embeddings: of both texts of each pair, one after the other, ``[2n, E]``.
            pairs: query and passage, ``[n]``.
            relevance: of the passage for the query, ``[n]``; that of all others is 0.
        """
        queries, query_of = _distinct([pair[0] for pair in pairs])
        passages, passage_of = _distinct([pair[1] for pair in pairs])
        unit = normalized(embeddings)
        passage_vectors = unit[1::2][passages]
        scores = []
        block = max(1, _BLOCK // len(passages))
        for start in range(0, len(queries), block):
            chosen = np.arange(start, min(start + block, len(queries)))
            similar = unit[0::2][queries[chosen]] @ passage_vectors.T
            best = np.argsort(-similar, axis=1, kind="stable")[:, :_DEPTH]
            gains = np.zeros(similar.shape)
            inside = (query_of >= start) & (query_of <= chosen[-1])
            np.maximum.at(gains, (query_of[inside] - start, passage_of[inside]), relevance[inside])
            ideal = _discounted(-np.sort(-gains, axis=1)[:, :_DEPTH])
            reached = _discounted(np.take_along_axis(gains, best, axis=1))
            scores.append((reached / np.where(ideal > 0, ideal, 1))[ideal > 0])
        return cls(np.concatenate(scores))

    @property
    def count(self) -> int:
        """Return the number of queries."""
        return len(self.of_queries)

    @property
    def percent(self) -> float:
        """Return the mean over queries, times 100."""
        return 100.0 * float(self.of_queries.mean())

    def resampled(self, counts: Floats) -> Floats:
        """Return the score of bootstrap samples."""
        return np.asarray(counts @ self.of_queries / counts.sum(axis=1))

    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both with two queries, of which each answers one perfectly and one not at all."""
        return (
            type(self)(np.append(self.of_queries, [1.0, 0.0])),
            type(self)(np.append(reference.of_queries, [0.0, 1.0])),
        )


def normalized(embeddings: npt.NDArray[Any]) -> Floats:
    """Return embeddings ``[n, E]`` of length 1, float64; those of length 0 stay."""
    exact = embeddings.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return np.asarray(exact / np.where(lengths > 0, lengths, 1))


def similarities(embeddings: npt.NDArray[Any]) -> Floats:
    """Return the cosine similarity of each pair, ``[n]``, of embeddings ``[2n, E]``."""
    unit = normalized(embeddings)
    return np.asarray((unit[0::2] * unit[1::2]).sum(axis=1))


def _distinct(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where each distinct text comes first, and the number of each text's, in that order."""
    numbers: dict[str, int] = {}
    firsts: list[int] = []
    for index, text in enumerate(texts):
        if text not in numbers:
            numbers[text] = len(firsts)
            firsts.append(index)
    return np.array(firsts), np.array([numbers[text] for text in texts])


def _discounted(gains: Floats) -> Floats:
    """Return the discounted cumulative gain of ranked gains ``[q, k]``."""
    return np.asarray(gains @ (1 / np.log2(np.arange(gains.shape[1]) + 2)))
