"""Groups become blocks without changing a single weight."""

import types

import pytest
import torch

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.packing.packed_linear import block_size_of, pack_linear, unpack_linear


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group"), [(64, 32), (112, 32), (96, 48), (600, 512), (100, 100), (20, 20)]
)
def test_dequantized_weight_is_unchanged(
    tools: types.SimpleNamespace, bits: int, symmetric: bool, columns: int, group: int
) -> None:
    layer = tools.quantize(torch.randn(5, columns), bits, group, symmetric)
    packed = pack_linear("layer", layer)
    stored = unpack_linear(packed)
    assert packed.bits == (8 if bits == 8 else 4)
    assert torch.equal(stored.codes, layer.codes)
    assert torch.equal(stored.dequantize(), layer.dequantize())


@pytest.mark.parametrize(("bits", "expected"), [(2, False), (3, False), (4, True), (8, True)])
def test_zero_points_are_left_out_only_where_default(
    tools: types.SimpleNamespace, bits: int, expected: bool
) -> None:
    packed = pack_linear("layer", tools.quantize(torch.randn(4, 64), bits, 32, True))
    assert (packed.zero_points is None) is expected


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [
        (768, 32, 32),
        (768, 48, 16),
        (3072, 512, 256),
        (768, 768, 128),  # per channel
        (96, 96, 32),  # per channel: the largest that divides
        (200, 200, 128),  # per channel: none divides
        (20, 20, 32),
        (7, 7, 16),
    ],
)
def test_block_size(tools: types.SimpleNamespace, columns: int, group: int, block: int) -> None:
    layer = tools.quantize(torch.randn(2, columns), 4, group, True)
    assert block_size_of("layer", layer) == block


@pytest.mark.parametrize("group", [24, 8, 33])
def test_group_size_without_block_is_refused(tools: types.SimpleNamespace, group: int) -> None:
    layer = tools.quantize(torch.randn(2, 96), 4, group, True)
    with pytest.raises(RecipeError, match=rf"encoder\.fc1.*{group}.*multiple of 16"):
        pack_linear("encoder.fc1", layer)
