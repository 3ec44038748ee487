"""Layers that run several times in a block: on tokens first, then on rows that tokens share."""

from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import BlockBatch, advance, input_of, record
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.models.tokens import weights_of_runs

WIDTH = 4


class Attention(nn.Module):
    """Multiplies tokens and a table of positions by one layer, as DeBERTa does."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(WIDTH, WIDTH)
        self.values = nn.Linear(WIDTH, WIDTH)
        self.positions = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        keys, values = self.keys(hidden), self.values(hidden)
        positions = self.keys(self.positions[None])
        output: Tensor = hidden + keys * values + positions.mean(dim=1, keepdim=True)
        return output


def block_and_batch() -> tuple[Attention, Tensor, BlockBatch, ActivationCache]:
    torch.manual_seed(0)
    block, hidden, cache = Attention().eval(), torch.randn(2, 5, WIDTH), ActivationCache()
    return block, hidden, BlockBatch(cache.keep(hidden)), cache


def joined(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten(0, -2) for part in parts])[None]


def test_the_rows_of_all_runs_are_seen() -> None:
    block, hidden, batch, cache = block_and_batch()
    seen = input_of(block, block.keys, batch, {}, cache, runs=2)
    assert torch.equal(seen, joined(hidden, block.positions))
    only = input_of(block, block.values, batch, {}, cache)
    assert torch.equal(only, hidden)


def test_outputs_of_every_run_are_remembered() -> None:
    """Also where a block stops between two runs of a layer."""
    block, hidden, batch, cache = block_and_batch()
    with torch.inference_mode():
        expected = block(hidden)
    done: dict[str, nn.Module] = {"keys": block.keys}
    for _ in range(2):
        # Values run before keys run on positions.
        input_of(block, block.values, batch, done, cache)
    advance(block, batch, cache, done=done)
    assert torch.equal(batch.hidden.value(), expected)
    assert batch.remembered == {}


def test_recorded_outputs_hold_all_runs_without_bias() -> None:
    block, hidden, batch, cache = block_and_batch()
    layers: dict[str, Any] = {"keys": block.keys, "values": block.values}
    outputs = record(block, batch, layers, {}, cache, repeated={"keys"})
    with torch.inference_mode():
        expected = joined(hidden, block.positions) @ block.keys.weight.T
    assert torch.allclose(outputs["keys"].peek(), expected, atol=1e-6)
    assert outputs["values"].peek().shape == hidden.shape


def test_shared_rows_weigh_as_much_as_all_tokens() -> None:
    tokens = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
    weights = weights_of_runs(tokens, 6 + 7)
    assert weights.shape == (1, 13)
    assert torch.equal(weights[0, :6], tokens.flatten())
    assert torch.allclose(weights[0, 6:], torch.full((7,), 3.5 / 7))
