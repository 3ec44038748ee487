"""F1 of entities, which words' tags like ``B-PER`` and ``I-PER`` spell, as seqeval defines it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from epmq_deploy.runtime.evaluation.bootstrap import ResampledScore
from epmq_deploy.runtime.evaluation.significance import Floats

_TAG = re.compile(r"O|[BIESLU][-_].+")
# The last and the only word of an entity, as seqeval's usual mode spells them.
_SPELLED = {"L": "E", "U": "S"}


def spell_entities(tags: Sequence[str]) -> bool:
    """Whether tags say where entities begin and of which type they are."""
    return all(_TAG.fullmatch(tag) for tag in tags)


@dataclass(frozen=True)
class EntityF1(ResampledScore):
    """F1 of the entities of all samples together; one counts if its type and words are right.

    Attributes:
        both: how many entities of each sample are predicted and true, ``[n]``.
        predicted: how many are predicted, ``[n]``.
        true: how many are true, ``[n]``.
    """

    both: Floats
    predicted: Floats
    true: Floats

    metric = "F1 of entities (seqeval), times 100"
    hub_name = "f1"

    @classmethod
    def of_tags(
        cls,
        predicted: npt.NDArray[np.int64],
        truth: npt.NDArray[np.int64],
        sizes: Sequence[int],
        tags: Sequence[str],
    ) -> Self:
        """Return the score of predicted tags.

        Args:
            predicted: number of each word's tag, ``[m]``, sample after sample.
            truth: likewise.
            sizes: words of each sample, ``[n]``; ``m`` together.
            tags: their names.
        """
        pairs = list(
            zip(_entities(predicted, sizes, tags), _entities(truth, sizes, tags), strict=True)
        )
        counts = [(len(ours & true), len(ours), len(true)) for ours, true in pairs]
        both, of_model, true = np.array(counts, dtype=np.float64).T
        return cls(both, of_model, true)

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return len(self.true)

    @property
    def percent(self) -> float:
        """Return the score, times 100."""
        return 100.0 * float(self.resampled(np.ones((1, self.count)))[0])

    def resampled(self, counts: Floats) -> Floats:
        """Return the score of bootstrap samples; 0 where they hold no entities."""
        both, size = counts @ self.both, counts @ (self.predicted + self.true)
        return np.asarray(np.divide(2 * both, size, out=np.zeros_like(both), where=size > 0))

    def with_doubt(self, reference: Self) -> tuple[Self, Self]:
        """Return both with two samples of one entity, of which each predicts one and no other."""
        true = np.append(self.true, [1, 1])
        ours, theirs = np.array([1, 0]), np.array([0, 1])
        return (
            type(self)(np.append(self.both, ours), np.append(self.predicted, ours), true),
            type(self)(
                np.append(reference.both, theirs), np.append(reference.predicted, theirs), true
            ),
        )


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities that a sample's tags spell: type, first and last word."""
    from seqeval.metrics.sequence_labeling import get_entities

    entities: list[tuple[str, int, int]] = get_entities(
        [_SPELLED.get(tag[0], tag[0]) + tag[1:] for tag in tags]
    )
    return entities


def _entities(
    numbers: npt.NDArray[np.int64], sizes: Sequence[int], tags: Sequence[str]
) -> Iterator[set[tuple[str, int, int]]]:
    """Yield each sample's entities."""
    for sample in np.split(numbers, np.cumsum(sizes)[:-1]):
        yield set(entities_of([tags[number] for number in sample]))
