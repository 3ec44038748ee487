"""Words tagged -100, which transformers takes as words without a tag."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from seqeval.metrics import accuracy_score, f1_score
from tiny_tags import TAGS
from tiny_text import TinyText
from torch.nn import functional as F

from epmq_deploy.data.class_labels import HeadClasses
from epmq_deploy.data.heads import Reading
from epmq_deploy.data.loading import load_samples
from epmq_deploy.data.targets import Targets, of_words_read, targets_of
from epmq_deploy.errors import RecipeError
from epmq_deploy.models import family_of
from epmq_deploy.models.problem_types import TOKEN, negative_log_likelihood
from epmq_deploy.recipe import DataSource
from epmq_deploy.runtime.evaluation.predictions import WordPredictions

HEAD = HeadClasses(len(TAGS), TAGS, TOKEN)
ROWS = [[0, -100, 1, 2], [-100, -100], [3, 4, 0, -100, 1]]


def targets(folder: Path, base: Path, rows: list[list[int]]) -> Targets:
    """Tags as numbers, read from a file."""
    lines = [{"tokens": ["red"] * len(tags), "ner_tags": tags} for tags in rows]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = DataSource(path=str(file))
    samples = load_samples("t", source, family_of(base), reading=Reading(words=True))
    return targets_of(samples, HEAD)


def test_they_do_not_count(tmp_path: Path, tiny_text: TinyText) -> None:
    known = targets(tmp_path, tiny_text.base, ROWS)
    assert [row.tolist() for row in known.values] == ROWS
    # As if the last word of the last row were cut off.
    read = [torch.arange(4), torch.arange(2), torch.arange(4)]
    truth = of_words_read(known, read)
    rng = np.random.default_rng(0)
    said = rng.integers(0, len(TAGS), len(truth))
    said[:4] = [0, 3, 1, 2]
    scored = WordPredictions(
        truth, {"m": said}, ("seqeval_f1", "accuracy"), len(TAGS), [4, 2, 4], TAGS
    ).labelled()
    # As transformers' example of token classification scores them.
    split = np.split(said, [4, 6])
    pairs = [
        [(TAGS[p], TAGS[t]) for p, t in zip(ours, row, strict=False) if t != -100]
        for ours, row in zip(split, ROWS, strict=True)
    ]
    predicted, true = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    assert scored.sizes == [3, 0, 3]
    assert scored.percents("m") == pytest.approx(
        {
            "seqeval_f1": 100 * f1_score(true, predicted),
            "accuracy": 100 * accuracy_score(true, predicted),
        }
    )
    assert scored.recalls("m")[0] is not None


def test_their_loss_is_none() -> None:
    logits, truth = torch.randn(4, 5), torch.tensor([0, -100, 4, -100])
    losses = negative_log_likelihood(logits, truth, TOKEN)
    assert losses[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(losses.sum() / 2, F.cross_entropy(logits, truth))


def test_other_negative_tags_are_refused(tmp_path: Path, tiny_text: TinyText) -> None:
    base = tiny_text.base
    with pytest.raises(RecipeError, match="row 0 holds -1"):
        targets(tmp_path, base, [[0, -1]])
    with pytest.raises(RecipeError, match="labels no word, all are -100"):
        targets(tmp_path, base, [[-100], [-100, -100]])
