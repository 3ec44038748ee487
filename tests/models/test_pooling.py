"""Pooling, against the module of sentence-transformers."""

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from epmq_deploy.models.pooling import POOLINGS, pooled


@pytest.mark.parametrize("modes", [*((name,) for name in POOLINGS), tuple(POOLINGS)])
def test_it_is_that_of_sentence_transformers(modes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    states = torch.randn(4, 7, 5)
    mask = (torch.arange(7) < torch.tensor([[7], [1], [4], [6]])).long()
    features = {"token_embeddings": states, "attention_mask": mask}
    expected = Pooling(5, modes)(features)["sentence_embedding"]
    torch.testing.assert_close(pooled(states, mask, modes), expected)  # type: ignore[arg-type]
