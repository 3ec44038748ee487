"""Corrections against plain least squares, brute force and numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.quantization.residuals.factors import (
    BIAS_BITS,
    FACTOR_BITS,
    LayerResiduals,
    TaskCorrection,
    rounded,
    stacked,
)
from epmq_deploy.quantization.residuals.fit import (
    TaskMoments,
    fit_correction,
    task_weight,
    whitened_svd,
)

OUT, IN, TOKENS, DAMPING = 6, 9, 80, 0.03


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outputs aimed at, and a quantized weight, float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) @ mixing + 0.5
    y = torch.randn(TOKENS, OUT, generator=generator, dtype=torch.float64) + x[:, :OUT]
    q = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    return x, y, q


def moments_of(x: Tensor, y: Tensor) -> TaskMoments:
    return TaskMoments(x.T @ x / len(x), y.T @ x / len(x), x.mean(0), y.mean(0))


def loss(weight: Tensor, q: Tensor, x: Tensor, y: Tensor) -> float:
    """The anchored ridge objective, row by row."""
    strength = DAMPING * float((x * x).mean())
    fit = float(((x @ weight.T - y) ** 2).sum()) / len(x)
    return fit + strength * float(((weight - q) ** 2).sum())


def test_the_task_weight_is_the_ridge_regression_of_stacked_rows(
    rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, y, q = rows
    strength = DAMPING * float((x * x).mean())
    design = torch.cat([x / TOKENS**0.5, strength**0.5 * torch.eye(IN, dtype=x.dtype)])
    target = torch.cat([y / TOKENS**0.5, strength**0.5 * q.T])
    expected = np.linalg.lstsq(design.numpy(), target.numpy(), rcond=None)[0].T
    found = task_weight(q, moments_of(x, y), DAMPING)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_full_rank_reproduces_the_tasks_own_regression(
    rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, y, q = rows
    moments = moments_of(x, y)
    left, right, _ = whitened_svd(q, moments, DAMPING, OUT)
    torch.testing.assert_close(q + left @ right, task_weight(q, moments, DAMPING))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_search_finds_a_better_correction_of_that_rank(
    rows: tuple[Tensor, Tensor, Tensor], rank: int
) -> None:
    """Gradient descent over both factors, from several starts, ends at the same loss."""
    x, y, q = rows
    left, right, sizes = whitened_svd(q, moments_of(x, y), DAMPING, rank)
    best = loss(q + left @ right, q, x, y)
    strength = DAMPING * float((x * x).mean())
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        a = (0.1 * torch.randn(OUT, rank, generator=generator, dtype=x.dtype)).requires_grad_()
        b = (0.1 * torch.randn(rank, IN, generator=generator, dtype=x.dtype)).requires_grad_()
        search = torch.optim.LBFGS([a, b], max_iter=2000, line_search_fn="strong_wolfe")

        def closure(a: Tensor = a, b: Tensor = b, search: torch.optim.Optimizer = search) -> Tensor:
            search.zero_grad()
            change = a @ b
            value = ((x @ (q + change).T - y) ** 2).sum() / len(x)
            value = value + strength * (change**2).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        search.step(closure)  # type: ignore[no-untyped-call, arg-type]
        found.append(loss((q + a @ b).detach(), q, x, y))
    assert min(found) == pytest.approx(best, rel=1e-6)
    # What is left is what the other singular values hold.
    own = loss(task_weight(q, moments_of(x, y), DAMPING), q, x, y)
    assert best - own == pytest.approx(float((sizes[rank:] ** 2).sum()), rel=1e-6)


def test_a_bias_takes_up_the_means(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """Mean outputs are the expert's, whatever the correction's rank."""
    x, y, q = rows
    expert_bias = torch.linspace(-1, 1, OUT, dtype=x.dtype)
    bias = torch.linspace(2, 3, OUT, dtype=x.dtype)
    correction = fit_correction(
        q, moments_of(x, y), rank=2, damping=DAMPING, bias_gap=expert_bias - bias
    )
    layer = stacked([correction])
    change = layer.bias_change(0)
    assert change is not None and correction.bias is not None
    weight = q + layer.weight(0).double()
    mean = (x @ weight.T).mean(0) + bias + correction.bias
    torch.testing.assert_close(mean, y.mean(0) + expert_bias)
    step = float(correction.bias.abs().max()) / (2 ** (BIAS_BITS - 1) - 1)
    assert float((change - correction.bias).abs().max()) <= step


def test_rounding_costs_little_of_what_a_correction_gains(
    rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, y, q = rows
    exact_left, exact_right, _ = whitened_svd(q, moments_of(x, y), DAMPING, 3)
    exact = loss(q + exact_left @ exact_right, q, x, y)
    layer = stacked([fit_correction(q, moments_of(x, y), rank=3, damping=DAMPING)])
    stored = loss(q + layer.weight(0).double(), q, x, y)
    nothing = loss(q, q, x, y)
    assert exact <= stored < exact + 0.05 * (nothing - exact)
    assert int(layer.left.abs().max()) <= 2 ** (FACTOR_BITS - 1) - 1
    assert layer.bias is None and layer.bias_change(0) is None


def test_inputs_that_are_zero_change_nothing() -> None:
    zero = TaskMoments(torch.zeros(IN, IN), torch.zeros(OUT, IN), torch.zeros(IN), torch.zeros(OUT))
    layer = stacked([fit_correction(torch.randn(OUT, IN), zero, rank=2, damping=DAMPING)])
    assert not layer.weight(0).any()


def test_moments_with_a_dead_direction_are_damped_until_they_can_be_factored() -> None:
    """Sums in float32 of equal columns are not positive definite."""
    x = torch.randn(30, 1).repeat(1, IN)
    moments = TaskMoments(
        x.T @ x / 30 - 1e-6 * torch.eye(IN), x[:, :OUT].T @ x / 30, x.mean(0), x[:, :OUT].mean(0)
    )
    correction = fit_correction(torch.zeros(OUT, IN), moments, rank=1, damping=1e-9)
    assert bool(torch.isfinite(stacked([correction]).weight(0)).all())


def test_moments_that_are_not_finite_are_refused() -> None:
    bad = TaskMoments(
        torch.full((IN, IN), torch.nan), torch.zeros(OUT, IN), torch.zeros(IN), torch.zeros(OUT)
    )
    with pytest.raises(NumericsError, match="not finite"):
        fit_correction(torch.zeros(OUT, IN), bad, rank=1, damping=DAMPING)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_finds_the_best_of_the_scales_it_tries(bits: int) -> None:
    values = torch.randn(5, 40, dtype=torch.float64) ** 3
    codes, scales = rounded(values, 1, bits)
    largest = 2 ** (bits - 1) - 1
    assert int(codes.abs().max()) <= largest
    for row, chosen, scale in zip(values, codes, scales, strict=True):
        error = float(((chosen * scale.double() - row) ** 2).sum())
        for share in np.arange(0.5, 1.001, 0.05):
            step = share * float(row.abs().max()) / largest
            other = (row / step).round().clamp(-largest, largest) * step
            assert error <= float(((other - row) ** 2).sum()) * (1 + 1e-5)


def test_bytes_are_those_of_packed_factors() -> None:
    one = TaskCorrection(
        torch.zeros(OUT, 2, dtype=torch.int8),
        torch.zeros(2, IN, dtype=torch.int8),
        torch.zeros(2),
        torch.zeros(OUT),
    )
    layer: LayerResiduals = stacked([one, one, one])
    assert layer.packed_bytes == 3 * (2 * (OUT + IN) // 2 + 2 * 4 + OUT) + 4
