"""The shared Hessian: its factor, its order and its damping."""

import pytest
import torch
from torch import Tensor

from epmq_deploy.quantization.solver.hessian import GroupHessian, Hessian, Identity


def matrix_of(columns: int = 40, samples: int = 200, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, -2, columns, dtype=torch.float64)
    return inputs.T @ inputs / samples


def right_of(columns: int = 40, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("act_order", [True, False])
def test_factor_is_that_of_the_ordered_matrix(act_order: bool) -> None:
    matrix = matrix_of()
    factor = Hessian(matrix, act_order=act_order).factor
    assert factor is not None
    assert factor.added == 0
    ordered = matrix[factor.order][:, factor.order]
    assert torch.allclose(factor.lower @ factor.lower.T, ordered, atol=1e-12)
    fixed_first = int(factor.order[-1])
    assert fixed_first == (int(matrix.diagonal().argmax()) if act_order else 0)


def test_solve_is_the_inverse() -> None:
    matrix, right = matrix_of(), right_of()
    solution = Hessian(matrix).solve(right, torch.zeros_like(right))
    assert torch.allclose(solution @ matrix, right, atol=1e-9)


@pytest.mark.parametrize("columns", [3, 256, 700])
def test_quadratic_is_the_trace(columns: int) -> None:
    matrix, error = matrix_of(columns, 800), right_of(columns)
    expected = float(torch.trace(error @ matrix @ error.T))
    assert Hessian(matrix).quadratic(error) == pytest.approx(expected, rel=1e-10)


def degenerate(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 40, generator=generator, dtype=torch.float64)
    if kind == "duplicate":
        inputs[:, 7] = inputs[:, 30]
    elif kind == "constant":
        inputs[:] = 1.5
    elif kind == "rank deficient":
        inputs = inputs[:25]
    else:
        inputs[:, 7] = 0
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("kind", ["duplicate", "constant", "rank deficient", "dead"])
def test_singular_matrices_are_damped_and_pulled_to_the_anchor(kind: str) -> None:
    matrix, anchor = degenerate(kind), right_of(seed=5)
    kept = matrix.clone()
    hessian = Hessian(matrix)
    assert hessian.factor is not None
    assert hessian.factor.added > 0
    assert torch.equal(matrix, kept)
    assert torch.allclose(hessian.damped - matrix, hessian.factor.added * torch.eye(40).double())
    # An anchor that already solves the problem is the solution nearest to itself.
    assert torch.allclose(hessian.solve(anchor @ matrix, anchor), anchor, atol=1e-6)


@pytest.mark.parametrize("matrix", [-torch.eye(4), torch.zeros(4, 4), torch.eye(4) * float("nan")])
def test_what_cannot_be_factored_gives_the_anchor(matrix: Tensor) -> None:
    hessian, anchor = Hessian(matrix), right_of(4)
    assert hessian.factor is None
    assert torch.equal(hessian.solve(torch.ones(5, 4).double(), anchor), anchor)
    assert hessian.finite == bool(torch.isfinite(matrix).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eliminating_a_bias_leaves_the_quadratic_of_its_best_value(dtype: torch.dtype) -> None:
    matrix, error = matrix_of(), right_of()
    mean = matrix.mean(dim=0)
    centred = GroupHessian(Hessian(matrix, dtype=dtype), mean, 2.0).centred
    assert centred.matrix.dtype == dtype
    bias = -(error @ mean) / 2.0
    best = torch.trace(error @ matrix @ error.T) + 2 * bias @ (error @ mean) + 2 * bias @ bias
    assert centred.quadratic(error) == pytest.approx(float(best), rel=1e-5)


def test_identity_is_the_identity() -> None:
    hessian, error = Identity(40, torch.device("cpu")), right_of()
    assert torch.equal(hessian.matrix, torch.eye(40).double())
    assert hessian.quadratic(error) == pytest.approx(float(error.square().sum()))
    assert torch.equal(hessian.solve(error, error), error)
