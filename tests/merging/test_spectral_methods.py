"""Merge methods that work on matrices: TSV-M, Iso-C, Iso-CTS, WUDI."""

import pytest
import torch
from task_vectors import InMemory, identical_vectors, merged, random_vectors
from torch import Tensor

from epmq_deploy.merging.methods.iso_cts import subspaces
from epmq_deploy.merging.methods.wudi import interference
from epmq_deploy.merging.ops.spectral import polar, top_triplets

SHAPES = {"wide": (12, 20), "tall": (20, 12)}
MATRIX_METHODS = ("tsv_m", "iso_c", "iso_cts", "wudi")


def orthonormal(matrix: Tensor) -> Tensor:
    """The polar factor by a plain singular value decomposition."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_leading_triplets_and_polar_factor_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = top_triplets(matrix, 4)
    assert torch.allclose(values, s[:4], atol=1e-5)
    assert torch.allclose((left * values) @ right, (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)
    nearest, spectrum = polar(matrix)
    assert torch.allclose(nearest, u @ v, atol=1e-5)
    assert torch.allclose(spectrum.flip(0), s, atol=1e-5)


def test_directions_a_matrix_lacks_are_not_filled_up() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(8, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    nearest, values = polar(low)
    assert len(values) == 2
    assert torch.allclose(torch.linalg.svdvals(nearest)[:2], torch.ones(2), atol=1e-5)
    assert float(torch.linalg.svdvals(nearest)[2]) < 1e-4
    left, values, right = top_triplets(low, 4)
    assert torch.allclose((left * values) @ right, low, atol=1e-5)
    assert not left[:, 2:].any()


@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_other_tensors_get_the_mean(method: str) -> None:
    vectors = random_vectors(3, shapes={"bias": (5,), "conv": (3, 2, 2)})
    for name, found in merged(method, vectors, base=1.0, scaling=0.5).items():
        expected = 1.0 + 0.5 * vectors.tensors[name].mean(dim=0)
        assert torch.allclose(found, expected, atol=1e-6)


def test_tsv_m_equals_the_plain_reference() -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    for name, found in merged("tsv_m", vectors, scaling=0.8).items():
        parts = [torch.linalg.svd(m, full_matrices=False) for m in vectors.tensors[name]]
        left = orthonormal(torch.cat([u[:, :4] for u, _, _ in parts], dim=1))
        right = orthonormal(torch.cat([v[:4] for _, _, v in parts], dim=0))
        values = torch.cat([s[:4] for _, s, _ in parts])
        assert torch.allclose(found, 0.8 * left @ torch.diag(values) @ right, atol=1e-4)


def test_tsv_m_of_identical_experts_is_their_leading_part() -> None:
    matrix = identical_vectors(2).tensors["fc.weight"]
    found = merged("tsv_m", InMemory({"w": matrix}, ["a", "b"]))["w"]
    u, s, v = torch.linalg.svd(matrix[0], full_matrices=False)
    assert torch.allclose(found, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)


def test_tsv_m_keeps_a_direction_of_every_task_of_a_thin_matrix() -> None:
    vectors = random_vectors(5, shapes={"w": (2, 30)})
    assert float(merged("tsv_m", vectors)["w"].norm()) > 1


def test_iso_c_flattens_the_spectrum_of_the_sum() -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    for name, found in merged("iso_c", vectors, scaling=1.4).items():
        u, s, v = torch.linalg.svd(vectors.tensors[name].sum(dim=0), full_matrices=False)
        assert torch.allclose(found, 1.4 * s.mean() * u @ v, atol=1e-4)


def plain_iso_cts(matrices: Tensor, shared: int, each: int) -> Tensor:
    """Iso-CTS with plain singular value decompositions."""
    u, s, v = torch.linalg.svd(matrices.sum(dim=0), full_matrices=False)
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [v[:shared]]
    for matrix in matrices:
        rest = matrix - u[:, :shared] @ u[:, :shared].T @ matrix
        own_u, own_s, own_v = torch.linalg.svd(rest, full_matrices=False)
        lefts.append(own_u[:, :each])
        values.append(own_s[:each])
        rights.append(own_v[:each])
    left, right = orthonormal(torch.cat(lefts, dim=1)), orthonormal(torch.cat(rights, dim=0))
    return torch.cat(values).mean() * left @ right


@pytest.mark.parametrize(("common", "shared", "each"), [(0.8, 9, 1), (0.5, 6, 2), (0.0, 0, 4)])
def test_iso_cts_equals_the_plain_reference(common: float, shared: int, each: int) -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    for name, found in merged("iso_cts", vectors, scaling=1.5, common=common).items():
        expected = 1.5 * plain_iso_cts(vectors.tensors[name], shared, each)
        assert torch.allclose(found, expected, atol=1e-4)


def test_iso_cts_with_all_directions_common_is_iso_c() -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    found = merged("iso_cts", vectors, scaling=1.0, common=1.0)
    for name, expected in merged("iso_c", vectors, scaling=1.0).items():
        assert torch.allclose(found[name], expected, atol=1e-5)


def test_subspaces_fill_the_rank() -> None:
    assert subspaces(768, 8, 0.8) == (616, 19)
    # Rounding up would take more directions than there are.
    assert subspaces(11, 4, 0.0) == (3, 2)
    assert subspaces(3, 5, 0.8) == (3, 0)


def loss(matrix: Tensor, vectors: Tensor) -> Tensor:
    """What WUDI lowers, as the paper writes it."""
    return sum(
        (((matrix - vector) @ vector.T) ** 2).sum() / (vector**2).sum() for vector in vectors
    )


def test_wudi_takes_the_steps_of_torch_s_adam() -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    options = {"steps": 40, "learning_rate": 0.01}
    for name, found in merged("wudi", vectors, **options).items():
        matrix = vectors.tensors[name].sum(dim=0).requires_grad_()
        optimizer = torch.optim.Adam([matrix], lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            loss(matrix, vectors.tensors[name]).backward()
            optimizer.step()
        assert torch.allclose(found, matrix.detach(), atol=1e-3)


def test_wudi_exact_has_no_slope_left_and_moves_least() -> None:
    vectors = random_vectors(2, shapes={"wide": (4, 20), "tall": (20, 4)})
    for name, found in merged("wudi", vectors, solver="exact").items():
        matrix = found.clone().requires_grad_()
        loss(matrix, vectors.tensors[name]).backward()
        assert matrix.grad is not None
        assert float(matrix.grad.abs().max()) < 1e-4
        change = found - vectors.tensors[name].sum(dim=0)
        curvature, _ = interference(vectors.tensors[name])
        values, directions = torch.linalg.eigh(curvature.double())
        empty = directions[:, values < 1e-7 * values[-1]].float()
        assert float((change @ empty).abs().max() if empty.numel() else 0) < 1e-4


def test_wudi_exact_of_identical_experts_is_the_expert() -> None:
    vectors = identical_vectors(3)
    found = merged("wudi", vectors, solver="exact")["fc.weight"]
    assert torch.allclose(found, vectors.tensors["fc.weight"][0], atol=1e-4)


def test_wudi_says_once_when_adam_cannot_leave_the_sum_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vectors = random_vectors(4)
    matrices = torch.cat([v.sum(dim=0).flatten() for v in vectors.tensors.values() if v.dim() == 3])
    size = float(matrices.square().mean().sqrt())
    merged("wudi", vectors, steps=10, learning_rate=0.099 * size)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"steps * learning_rate = {0.99 * size:.2g}, " in record.message
    assert f"starts from are {size:.2g} (" in record.message
    assert "merge.solver: exact" in record.message
    assert f"merge.learning_rate: {3 * size / 10:.2g}" in record.message
    caplog.clear()
    merged("wudi", vectors, steps=10, learning_rate=0.101 * size)
    merged("wudi", vectors, solver="exact")
    merged("wudi", vectors, steps=0)
    assert not caplog.records
