"""F1 of entities, against ``seqeval``."""

import numpy as np
import pytest
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU, IOBES

from epmq_deploy.runtime.evaluation.entity_f1 import EntityF1, spell_entities

RNG = np.random.default_rng(0)
KINDS = ("PER", "LOC")


def tags_of(parts: str) -> list[str]:
    """The tags of a scheme."""
    return ["O", *(f"{part}-{kind}" for part in parts for kind in KINDS)]


def split(numbers: np.ndarray, sizes: list[int], tags: list[str]) -> list[list[str]]:
    """Tags as ``seqeval`` takes them."""
    return [[tags[i] for i in sample] for sample in np.split(numbers, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("parts", ["BI", "I", "BIES"])
def test_it_is_seqevals(parts: str) -> None:
    """Also of tags in no order that makes sense, and of samples without words or entities."""
    tags, sizes = tags_of(parts), [5, 1, 0, 12, 7]
    truth, predicted = RNG.integers(0, len(tags), (2, sum(sizes)))
    score = EntityF1.of_tags(predicted, truth, sizes, tags)
    expected = f1_score(split(truth, sizes, tags), split(predicted, sizes, tags))
    assert score.percent == pytest.approx(100 * float(expected))
    assert score.percent > 0


def test_other_letters_for_last_and_only_words_mean_the_same() -> None:
    """Of tags in their order, seqeval's strict mode of that scheme agrees."""
    bilou, bioes = tags_of("BILU"), tags_of("BIES")
    truth = np.array([7, 0, 1, 3, 5, 8, 2, 6])
    predicted = np.array([7, 0, 1, 3, 5, 0, 2, 6])
    renamed = {name: bioes.index(name.replace("L-", "E-").replace("U-", "S-")) for name in bilou}
    assert list(renamed) == bilou
    score = EntityF1.of_tags(predicted, truth, [8], bilou).percent
    for tags, scheme in ((bilou, BILOU), (bioes, IOBES)):
        numbers = [
            [tags[renamed[bilou[i]] if tags is bioes else i] for i in row]
            for row in (truth, predicted)
        ]
        expected = f1_score([numbers[0]], [numbers[1]], mode="strict", scheme=scheme)
        assert score == pytest.approx(100 * float(expected))


def test_bootstrap_samples_are_scored_as_if_spelled_out() -> None:
    tags, sizes = tags_of("BI"), [4, 6, 3, 5]
    truth, predicted = RNG.integers(0, len(tags), (2, sum(sizes)))
    score = EntityF1.of_tags(predicted, truth, sizes, tags)
    counts = np.array([[2, 0, 1, 1], [0, 3, 0, 1]])
    rows = [np.repeat(np.arange(4), row) for row in counts]
    true, said = (split(numbers, sizes, tags) for numbers in (truth, predicted))
    expected = [f1_score([true[i] for i in row], [said[i] for i in row]) for row in rows]
    np.testing.assert_allclose(score.resampled(counts.astype(float)), expected)


def test_a_model_that_finds_more_is_better_beyond_doubt() -> None:
    tags, sizes = tags_of("BI"), [3] * 60
    truth = np.tile([1, 3, 0], 60)
    good, bad = (
        EntityF1.of_tags(truth, truth, sizes, tags),
        EntityF1.of_tags(np.zeros_like(truth), truth, sizes, tags),
    )
    gains = good.gains(bad, np.random.default_rng(0))
    assert good.p_value(bad, gains) < 0.01
    assert bad.percent == 0


@pytest.mark.parametrize(
    ("tags", "spelled"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["I_LOC", "O"], True),
        (["NOUN", "VERB", "O"], False),
        (["B", "I", "O"], False),
    ],
)
def test_which_tags_spell_entities(tags: list[str], spelled: bool) -> None:
    assert spell_entities(tags) is spelled
