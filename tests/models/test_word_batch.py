"""Batches of texts given as words."""

import torch
from tiny_text import TinyText

from epmq_deploy.models import family_of
from epmq_deploy.models.predictions import features_of
from epmq_deploy.models.token_batch import WordBatch, Words, on_device, tokens_read, words_read
from epmq_deploy.models.tokens import TokenWeights

SAMPLES = (Words(("red", "houses", "sings")), Words(("tree",)), Words(("red",) * 30))


def batch_of(tiny_text: TinyText) -> WordBatch:
    """A batch of three samples."""
    batch = family_of(tiny_text.base).collate(tiny_text.base, SAMPLES)
    assert isinstance(batch, WordBatch)
    return batch


def test_words_are_read_at_their_first_token(tiny_text: TinyText) -> None:
    """Not special tokens, padding, later tokens of a word, or what is cut off."""
    batch = batch_of(tiny_text)
    assert batch.words.shape == batch[0].shape == (3, 16)
    assert batch.words[0, :7].tolist() == [-1, 0, 1, -1, 2, -1, -1]
    assert [row.tolist() for row in words_read(batch)] == [[0, 1, 2], [0], list(range(14))]


def test_all_real_tokens_matter_to_quantization(tiny_text: TinyText) -> None:
    """Where a sentence classifier would have it that the first one does."""
    batch = batch_of(tiny_text)
    tokens = family_of(tiny_text.base).tokens(*batch)
    assert tokens.pooled is not None
    weights = tokens_read(tokens, batch).weights(batch[0].shape, 0.1, torch.device("cpu"))
    assert weights is not None
    assert torch.equal(weights, batch[1].float())
    assert tokens_read(tokens, tuple(batch)) is tokens
    assert tokens_read(TokenWeights(), batch) == TokenWeights()


def test_features_are_the_states_of_first_tokens(tiny_text: TinyText) -> None:
    family = family_of(tiny_text.base)
    model, batch = family.load(tiny_text.base), batch_of(tiny_text)
    states = model(*batch).last_hidden_state
    features = features_of(family, model, on_device(batch, torch.device("cpu")))
    assert torch.equal(features[:3], states[0, [1, 2, 4]])
    assert len(features) == 3 + 1 + 14
