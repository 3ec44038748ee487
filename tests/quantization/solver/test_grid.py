"""Grids."""

import pytest
import torch

from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.quantization.solver.gptq import round_to_nearest
from epmq_deploy.quantization.solver.grid import expand_groups, fit_grid


def quantized(weight: torch.Tensor, **options: object) -> QuantizedLinear:
    grid = fit_grid(weight, **options)  # type: ignore[arg-type]
    return QuantizedLinear(
        round_to_nearest(weight, grid),
        grid.scales,
        grid.zero_points,
        grid.bits,
        grid.group_size,
        grid.symmetric,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_half_a_step_without_clip_search(bits: int, symmetric: bool) -> None:
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    linear = quantized(weight, bits=bits, group_size=16, symmetric=symmetric, clip_search=False)
    step = expand_groups(linear.scales, 16, 48)
    # The zero point is rounded, which costs the ends of the range up to half a step more.
    assert ((linear.dequantize() - weight).abs() <= 1.001 * step).all()
    assert int(linear.codes.max()) < 2**bits


def test_weights_already_on_a_grid_come_back_exactly() -> None:
    codes = torch.arange(16, dtype=torch.float32).repeat(3, 2)
    weight = (codes - 5.0) * 0.25
    linear = quantized(weight, bits=4, group_size=16, symmetric=False)
    assert torch.equal(linear.dequantize(), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_never_raises_the_weighted_error(symmetric: bool) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) ** 3
    importance = torch.rand(64, generator=torch.Generator().manual_seed(3))
    errors = []
    for clip_search in (False, True):
        linear = quantized(
            weight,
            bits=3,
            group_size=32,
            symmetric=symmetric,
            clip_search=clip_search,
            importance=importance,
        )
        step = expand_groups(linear.scales, 32, 64)
        missed = (linear.dequantize() - weight) / step
        cost = step**2 * (missed**2 + 0.1 * missed**4) * importance
        errors.append(cost.reshape(16, 2, 32).sum(dim=2))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_symmetric_zero_points_are_the_middle_code() -> None:
    linear = quantized(torch.randn(4, 32), bits=4, group_size=16, symmetric=True)
    assert (linear.zero_points == 8).all()


def test_zero_and_constant_groups_survive() -> None:
    weight = torch.zeros(2, 32)
    weight[1, :16] = 3.0
    linear = quantized(weight, bits=4, group_size=16, symmetric=False)
    assert torch.isfinite(linear.scales).all()
    assert (linear.scales > 0).all()
    assert torch.allclose(linear.dequantize(), weight)


def test_a_short_last_group_has_its_own_scale() -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    linear = quantized(weight, bits=4, group_size=16, symmetric=False)
    alone = quantized(weight[:, 32:], bits=4, group_size=8, symmetric=False)
    assert linear.scales.shape == (3, 3)
    assert torch.equal(linear.scales[:, 2:], alone.scales)
    assert torch.equal(linear.codes[:, 32:], alone.codes)
