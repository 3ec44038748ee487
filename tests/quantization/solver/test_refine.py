"""Refinement after the solver."""

import itertools

import pytest
import torch
from torch import Tensor

from epmq_deploy.quantization.solver.gptq import dequantize, round_to_nearest, solve
from epmq_deploy.quantization.solver.grid import Grid, fit_grid
from epmq_deploy.quantization.solver.hessian import Hessian
from epmq_deploy.quantization.solver.refine import Refinement, refine


def problem(rows: int = 16, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and a correlated Hessian."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(0, -2, columns, dtype=torch.float64)[:, None]
    inputs = torch.randn(300, columns, generator=generator, dtype=torch.float64) @ (
        spectrum * mixing
    )
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs / 300 + 1e-3 * torch.eye(columns, dtype=torch.float64)


def loss(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> float:
    error = dequantize(codes, grid) - weight
    return float(torch.trace(error @ hessian @ error.T))


def refined(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    grid: Grid,
    *,
    sweeps: int,
    tolerance: float = 1e-3,
    block_size: int = 32,
) -> Refinement:
    return refine(
        weight,
        hessian,
        codes,
        grid,
        objective=loss(weight, hessian, codes, grid),
        sweeps=sweeps,
        tolerance=tolerance,
        block_size=block_size,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [16, 24, 64])
def test_every_sweep_lowers_the_exact_objective(
    bits: int, group_size: int, symmetric: bool
) -> None:
    weight, hessian = problem()
    grid = fit_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    codes = solve(weight, Hessian(hessian), grid).codes
    losses = [loss(weight, hessian, codes, grid)]
    for sweeps in (1, 2, 4):
        result = refined(weight, hessian, codes, grid, sweeps=sweeps, tolerance=0.0)
        losses.append(loss(weight, hessian, result.codes, result.grid))
        assert result.objective == pytest.approx(losses[-1], rel=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_stays_on_the_grid_and_leaves_its_inputs_alone() -> None:
    weight, hessian = problem()
    grid = fit_grid(weight, bits=3, group_size=16, symmetric=False)
    codes = round_to_nearest(weight, grid)
    kept = codes.clone(), grid.scales.clone(), weight.clone()
    done = refined(weight, hessian, codes, grid, sweeps=5)
    refined_codes = done.codes
    assert torch.equal(codes, kept[0])
    assert torch.equal(grid.scales, kept[1])
    assert torch.equal(weight, kept[2])
    assert refined_codes.dtype == torch.uint8
    assert int(refined_codes.max()) <= 7
    assert done.grid.scales.dtype == torch.float32
    assert (done.grid.scales > 0).all()
    assert torch.equal(done.grid.zero_points, grid.zero_points)


def test_ends_where_no_single_code_can_be_improved() -> None:
    weight, hessian = problem(rows=2, columns=32)
    grid = fit_grid(weight, bits=2, group_size=32, symmetric=True)
    start = round_to_nearest(weight, grid)
    done = refined(weight, hessian, start, grid, sweeps=200, tolerance=0.0)
    codes, grid = done.codes, done.grid
    best = loss(weight, hessian, codes, grid)
    for row in range(2):
        for column in range(32):
            for code in range(4):
                other = codes.clone()
                other[row, column] = code
                assert loss(weight, hessian, other, grid) >= best * (1 - 1e-12)


def test_does_not_depend_on_the_block_size() -> None:
    weight, hessian = problem()
    grid = fit_grid(weight, bits=3, group_size=16, symmetric=False)
    codes = solve(weight, Hessian(hessian), grid).codes
    reference = refined(weight, hessian, codes, grid, sweeps=3, block_size=64)
    for block_size in (1, 5, 1000):
        result = refined(weight, hessian, codes, grid, sweeps=3, block_size=block_size)
        assert torch.equal(result.codes, reference.codes)
        assert torch.allclose(result.grid.scales, reference.grid.scales)


def test_a_zero_group_survives() -> None:
    weight, hessian = problem()
    weight[:, :16] = 0
    grid = fit_grid(weight, bits=4, group_size=16, symmetric=True)
    done = refined(weight, hessian, round_to_nearest(weight, grid), grid, sweeps=2)
    assert torch.isfinite(done.grid.scales).all()
    assert (done.grid.scales > 0).all()
    assert int(done.codes.max()) < 16
