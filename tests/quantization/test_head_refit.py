"""Re-fitted heads: the solution of a convex problem, held to the head as it was."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from epmq_deploy.models import TaskHead
from epmq_deploy.models.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, divergence
from epmq_deploy.quantization.head_refit import fit_classifier, refit_head
from epmq_deploy.recipe import ProblemType


def problem(classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, an expert's logits, and a classifier that is not the expert's."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, 6, generator=generator)
    weight = torch.randn(classes, 6, generator=generator)
    logits = inputs @ torch.randn(classes, 6, generator=generator).T + weight.sum(dim=1)
    return inputs, logits, weight, torch.randn(classes, generator=generator)


def objective(
    inputs: Tensor,
    logits: Tensor,
    start: tuple[Tensor, Tensor],
    fitted: tuple[Tensor, Tensor],
    pull: float,
    kind: ProblemType,
) -> float:
    temperature = 1.0 if kind == REGRESSION else 2.0
    predicted = inputs @ fitted[0].T + fitted[1]
    away = divergence(predicted / temperature, logits / temperature, kind).mean() * temperature**2
    moved = (fitted[0] - start[0]).square().sum() * inputs.square().mean()
    moved += (fitted[1] - start[1]).square().sum()
    return float(away + pull * moved / len(start[0]))


@pytest.mark.parametrize("pull", [0.01, 0.3])
@pytest.mark.parametrize(("kind", "classes"), [(SINGLE_LABEL, 4), (MULTI_LABEL, 3)])
def test_the_fit_is_the_minimum_that_scipy_finds(
    kind: ProblemType, classes: int, pull: float
) -> None:
    inputs, logits, weight, bias = (part.double() for part in problem(classes))
    fitted = fit_classifier(inputs, logits, weight, bias, pull=pull, kind=kind)

    def value(flat: np.ndarray) -> float:  # type: ignore[type-arg]
        parts = torch.from_numpy(flat).split([weight.numel(), classes])
        given = parts[0].reshape(weight.shape), parts[1]
        return objective(inputs, logits, (weight, bias), given, pull, kind)

    reference = minimize(value, np.zeros(weight.numel() + classes), method="BFGS").fun
    ours = objective(
        inputs, logits, (weight, bias), (fitted[0].double(), fitted[1].double()), pull, kind
    )
    assert ours == pytest.approx(reference, rel=1e-4)


def test_a_fit_of_values_is_ridge_regression() -> None:
    inputs, logits, weight, bias = (part.double() for part in problem(1))
    fitted = fit_classifier(inputs, logits, weight, bias, pull=0.2, kind=REGRESSION)
    rows = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    start = torch.cat([weight, bias[:, None]], dim=1)
    hold = torch.cat([torch.full((6,), 2 * 0.2 * inputs.square().mean()), torch.tensor([2 * 0.2])])
    left = rows.T @ rows / len(rows) + torch.diag(hold).double()
    right = rows.T @ (logits - rows @ start.T) / len(rows)
    expected = start + torch.linalg.solve(left, right).T
    torch.testing.assert_close(fitted[0].double(), expected[:, :6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted[1].double(), expected[:, 6], rtol=1e-4, atol=1e-5)


def test_a_strong_pull_leaves_the_head_as_it_was() -> None:
    inputs, logits, weight, bias = problem(4)
    head = refit_head(TaskHead(weight, bias), inputs, logits, 1e6)
    torch.testing.assert_close(head.weight.data, weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(head(inputs), TaskHead(weight, bias)(inputs), rtol=0, atol=1e-2)


def test_only_the_classifier_of_a_head_changes() -> None:
    inputs, logits, weight, bias = problem(4)
    pooler = torch.eye(6) * 0.5
    head = TaskHead(weight, bias, pooler, torch.zeros(6))
    before = divergence(head(inputs), logits).mean()
    with torch.no_grad():
        taken = head.classifier_inputs(inputs)
    refitted = refit_head(head, taken, logits, 0.1)
    assert torch.equal(refitted.pooler_weight, head.pooler_weight)  # type: ignore[arg-type]
    assert divergence(refitted(inputs), logits).mean() < before
    assert torch.equal(head.weight.data, weight)


def test_a_classifier_averaged_over_tokens_takes_averaged_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 7, 6, generator=generator)
    shares = torch.rand(5, 7, 1, generator=generator)
    shares /= shares.sum(dim=1, keepdim=True)
    head = TaskHead(torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator))
    embedding = torch.cat([tokens, shares], dim=-1)
    with torch.no_grad():
        taken = head.classifier_inputs(embedding)
    torch.testing.assert_close(taken @ head.weight.T + head.bias, head(embedding))  # type: ignore[operator]
