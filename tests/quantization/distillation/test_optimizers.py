"""Muon for matrices, Adam for all else."""

import pytest
import torch
from torch import nn

from epmq_deploy.quantization.distillation.optimizers import Optimizers, orthogonalized


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_singular_values_become_alike_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    result = left.T @ orthogonalized(matrix) @ right.T
    diagonal = result.diagonal()
    assert float(values.max() / values.min()) > 1.5
    assert bool(((diagonal > 0.3) & (diagonal < 1.3)).all())
    torch.testing.assert_close(result, torch.diag(diagonal), atol=1e-4, rtol=0)


def test_a_step_changes_entries_of_any_shape_by_as_much() -> None:
    torch.manual_seed(0)
    sizes = []
    for shape in ((32, 32), (32, 128), (128, 32)):
        matrix = nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape) * 1e3
        Optimizers({"m": matrix}, ["m"]).step(0.3)
        sizes.append(float(matrix.detach().square().mean().sqrt()))
    assert all(0.2 < size < 0.35 for size in sizes)


def test_vectors_and_other_matrices_move_as_adam_moves_them() -> None:
    ours, theirs = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizers = Optimizers({"table": ours}, ["block"])
    reference = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.98))
    for step in range(3):
        gradient = torch.full((4, 3), float(step + 1))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizers.step(0.1)
        reference.step()
    torch.testing.assert_close(ours, theirs)
    assert ours.grad is None
