"""Layers outside the blocks: what is planned for them is what they get."""

from typing import Any

import pytest
import torch
from torch import nn

from epmq_deploy.quantization.embeddings import (
    RoundingGrid,
    planned_outside_blocks,
    quantize_outside_blocks,
)
from epmq_deploy.quantization.methods.rtn import RtnOptions


class Model(nn.Module):
    """A block, a projection, a table that shares its weight, a convolution, a small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(96, 96)
        self.projection = nn.Linear(96, 40)
        self.table = nn.Embedding(50, 96)
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.table.weight
        self.patches = nn.Conv2d(3, 16, 4)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.small = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 32, "symmetric": True},
        {"group_size": -1},
        {"skip": ("head", "pro*")},
        {"outer": False},
    ],
)
def test_what_is_planned_is_what_is_made(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, chosen = Model(), RtnOptions(**options)
    planned = planned_outside_blocks(model, {"block"}, chosen)
    layers, _ = quantize_outside_blocks(model, {"block"}, chosen)
    assert planned == {
        name: RoundingGrid(layer.bits, layer.group_size, layer.symmetric)
        for name, layer in layers.items()
    }
    expected = {"projection", "table", "head", "patches"}
    skipped = {"projection", "head", "table"} if chosen.skip else set()
    assert planned.keys() == (expected - skipped if chosen.outer else set())
