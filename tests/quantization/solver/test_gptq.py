"""The solver against brute force and on hostile input."""

import pytest
import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.quantization.solver.gptq import dequantize, round_to_nearest, solve
from epmq_deploy.quantization.solver.grid import Grid, expand_groups, fit_grid, quantize_to_codes
from epmq_deploy.quantization.solver.hessian import Hessian


def correlated_hessian(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    # A falling spectrum, as activations have.
    mixing = torch.logspace(0, -2, columns, dtype=torch.float64)[:, None] * mixing
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return inputs.T @ inputs / inputs.shape[0]


def random_weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def grid_of(weight: Tensor, group_size: int = 16, bits: int = 4, symmetric: bool = False) -> Grid:
    return fit_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric)


def objective(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid) -> float:
    error = dequantize(codes, grid) - weight
    return float(torch.trace(error @ hessian @ error.T))


def brute_force(weight: Tensor, hessian: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Optimal Brain Quantization in a fixed order: re-solves the open columns after each one."""
    rows, columns = weight.shape
    scale = expand_groups(grid.scales.double(), grid.group_size, columns)
    zero = expand_groups(grid.zero_points.double(), grid.group_size, columns)
    current, codes = weight.clone(), torch.zeros(rows, columns, dtype=torch.uint8)
    for position, column in enumerate(order):
        code = quantize_to_codes(current[:, column], scale[:, column], zero[:, column], grid.bits)
        codes[:, column] = code.to(torch.uint8)
        error = (code - zero[:, column]) * scale[:, column] - current[:, column]
        rest = order[position + 1 :]
        if rest:
            # Least squares over the open columns with this one's error fixed.
            move = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, column])
            current[:, rest] -= error[:, None] * move
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [16, 40])
def test_equals_a_brute_force_sequential_reference(act_order: bool, group_size: int) -> None:
    weight, hessian = random_weight(6, 40), correlated_hessian(40)
    grid = grid_of(weight, group_size)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(40))
    solution = solve(weight, Hessian(hessian, act_order=act_order), grid)
    assert solution.status == "solved"
    assert torch.equal(solution.codes, brute_force(weight, hessian, grid, order))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_does_not_depend_on_the_block_size(bits: int) -> None:
    weight, hessian = random_weight(8, 96), correlated_hessian(96)
    grid = grid_of(weight, bits=bits)
    reference = solve(weight, Hessian(hessian), grid, block_size=96).codes
    for block_size in (1, 7, 32, 1000):
        assert torch.equal(
            solve(weight, Hessian(hessian), grid, block_size=block_size).codes, reference
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    weight, hessian = random_weight(32, 64), correlated_hessian(64)
    grid = grid_of(weight, bits=bits, symmetric=symmetric)
    solution = solve(weight, Hessian(hessian), grid)
    solved = objective(weight, solution.codes, hessian, grid)
    assert solution.objective == pytest.approx(solved, rel=1e-9)
    rounded = objective(weight, round_to_nearest(weight, grid), hessian, grid)
    assert solved < 0.7 * rounded


def test_identity_hessian_is_rounding_to_nearest() -> None:
    weight = random_weight(5, 48)
    grid = grid_of(weight)
    codes = solve(weight, Hessian(torch.eye(48)), grid).codes
    assert torch.equal(codes, round_to_nearest(weight, grid))


def test_leaves_its_inputs_alone() -> None:
    weight, hessian = random_weight(4, 32), correlated_hessian(32)
    kept = weight.clone(), hessian.clone()
    grid = grid_of(weight)
    scales = grid.scales.clone()
    solve(weight, Hessian(hessian), grid)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])
    assert torch.equal(grid.scales, scales)


@pytest.mark.parametrize("kind", ["duplicate", "constant", "rank deficient"])
def test_singular_hessians_are_damped_and_say_so(kind: str) -> None:
    weight = random_weight(4, 32)
    inputs = random_weight(3 if kind == "rank deficient" else 200, 32, seed=5)
    if kind == "duplicate":
        inputs[:, 3] = inputs[:, 20]
    if kind == "constant":
        inputs[:] = 2.0
    hessian, grid = inputs.T @ inputs, grid_of(weight)
    solution = solve(weight, Hessian(hessian), grid)
    assert solution.status == "damping_raised"
    assert solution.added_damping > 0
    solved = objective(weight, solution.codes, hessian, grid)
    assert solved < objective(weight, round_to_nearest(weight, grid), hessian, grid)


def test_indefinite_hessian_is_an_error_unless_fallback_is_allowed() -> None:
    weight = random_weight(4, 32)
    hessian = -torch.eye(32, dtype=torch.float64)
    grid = grid_of(weight)
    with pytest.raises(NumericsError, match="not positive definite"):
        solve(weight, Hessian(hessian), grid)
    solution = solve(weight, Hessian(hessian), grid, allow_fallback=True)
    assert solution.status == "fallback_rtn"
    assert torch.equal(solution.codes, round_to_nearest(weight, grid))


@pytest.mark.parametrize("where", ["weight", "hessian"])
def test_nan_is_an_error_even_where_fallback_is_allowed(where: str) -> None:
    weight, hessian = random_weight(4, 32), correlated_hessian(32)
    grid = grid_of(weight)
    (weight if where == "weight" else hessian)[1, 2] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        solve(weight, Hessian(hessian), grid, allow_fallback=True)
