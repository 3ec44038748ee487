"""Keeping activations in memory and on disk."""

from pathlib import Path

import pytest
import torch

from epmq_deploy.calibration.cache import ActivationCache


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_gives_back_what_was_kept(
    limit: int | None, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    tensor = torch.randn(3, 5, 7)
    kept = ActivationCache(limit, tmp_path).keep(tensor, dtype)
    expected = tensor if dtype is None else tensor.to(dtype).to(torch.float32)
    assert torch.equal(kept.value(), expected)
    assert kept.value().dtype == torch.float32
    assert kept.peek().dtype == (dtype or torch.float32)
    assert torch.equal(kept.peek().to(torch.float32), expected)


@pytest.mark.parametrize("limit", [None, 0])
def test_callers_and_cache_do_not_share_memory(limit: int | None, tmp_path: Path) -> None:
    tensor = torch.ones(4)
    kept = ActivationCache(limit, tmp_path).keep(tensor)
    tensor.zero_()
    kept.value().zero_()
    assert torch.equal(kept.value(), torch.ones(4))


def test_memory_stays_within_the_limit_and_is_freed(tmp_path: Path) -> None:
    cache = ActivationCache(100, tmp_path)
    items = [cache.keep(torch.full((10,), float(index))) for index in range(5)]
    assert (cache.in_memory, cache.on_disk) == (80, 120)
    assert len(list(tmp_path.glob("*/*"))) == 3
    assert [float(item.value()[0]) for item in items] == [0, 1, 2, 3, 4]
    del items[0], items[-1]
    assert (cache.in_memory, cache.on_disk) == (40, 80)
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_a_view_does_not_hold_on_to_the_whole() -> None:
    whole = torch.randn(1000, 10)
    kept = ActivationCache().keep(whole[:1])
    assert kept.value().untyped_storage().nbytes() == 40
    assert kept.peek().untyped_storage().nbytes() == 40
