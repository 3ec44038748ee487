"""Merge methods that work on matrices: TSV-M, Iso-C, Iso-CTS, WUDI, DC-Merge, KnOTS, decoupled."""

import itertools

import pytest
import torch
from task_vectors import InMemory, identical_vectors, merged, random_vectors
from torch import Tensor

from epmq_deploy.merging.methods.iso_cts import subspaces
from epmq_deploy.merging.methods.wudi import interference
from epmq_deploy.merging.ops.spectral import polar, shared_basis, smoothed, top_triplets

SHAPES = {"wide": (12, 20), "tall": (20, 12)}
MATRIX_METHODS = ("tsv_m", "iso_c", "iso_cts", "wudi", "dc_merge", "knots", "decoupled")


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


def test_smoothing_keeps_the_sum_of_singular_values() -> None:
    values = torch.tensor([8.0, 3.0, 2.0, 1.0, 0.0])
    assert torch.equal(smoothed(values, "none", 5.0), values)
    equal = torch.tensor([3.5, 3.5, 3.5, 3.5, 0.0])
    assert torch.allclose(smoothed(values, "average", 5.0), equal)
    linear = smoothed(values, "linear", 4.0)
    assert torch.allclose(linear, 14 * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]) / 10)
    # They were flatter than asked for.
    narrow = torch.tensor([2.0, 1.9, 1.0])
    assert torch.allclose(smoothed(narrow, "linear", 5.0), 4.9 * torch.tensor([2, 1.5, 1]) / 4.5)
    assert not smoothed(torch.zeros(3), "average", 5.0).any()


def plain_dc_merge(matrices: Tensor, density: float, smoothing: str) -> Tensor:
    """DC-Merge with plain singular value decompositions, entry by entry."""
    tasks, rank = len(matrices), min(matrices.shape[1:]) // len(matrices)
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = orthonormal(torch.cat([u[:, :rank] for u, _, _ in parts], dim=1))
    right = orthonormal(torch.cat([v[:rank] for _, _, v in parts], dim=0))
    trimmed = []
    for u, s, v in parts:
        values = s[:rank]
        if smoothing == "average":
            values = torch.full((rank,), float(values.mean()))
        low = u[:, :rank] @ torch.diag(values) @ v[:rank]
        inside = left.T @ low @ right.T
        bound = inside.abs().flatten().sort(descending=True).values
        count = max(rank, int(density * inside.numel()))
        trimmed.append(torch.where(inside.abs() >= bound[count - 1], inside, 0.0))
    merged = torch.zeros(tasks * rank, tasks * rank)
    for row, column in itertools.product(range(tasks * rank), repeat=2):
        entries = [float(part[row, column]) for part in trimmed]
        agreeing = [value for value in entries if value * sum(entries) > 0]
        if agreeing and row // rank == column // rank:
            merged[row, column] = sum(agreeing) / len(agreeing)
    return left @ merged @ right


@pytest.mark.parametrize(
    ("density", "smoothing"), [(0.001, "none"), (0.3, "none"), (1.0, "none"), (0.2, "average")]
)
def test_dc_merge_equals_the_plain_reference(density: float, smoothing: str) -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    found = merged("dc_merge", vectors, scaling=0.8, density=density, smoothing=smoothing)
    for name, value in found.items():
        expected = 0.8 * plain_dc_merge(vectors.tensors[name], density, smoothing)
        assert torch.allclose(value, expected, atol=1e-4)


def test_dc_merge_of_experts_in_other_directions_is_their_sum() -> None:
    blocks = torch.zeros(3, 12, 20)
    generator = torch.Generator().manual_seed(0)
    for task, block in enumerate(blocks):
        rows, columns = slice(4 * task, 4 * task + 4), slice(6 * task, 6 * task + 6)
        block[rows, columns] = torch.randn(4, 6, generator=generator)
    found = merged("dc_merge", InMemory({"w": blocks}, ["a", "b", "c"]), scaling=1.0)["w"]
    assert torch.allclose(found, blocks.sum(dim=0), atol=1e-5)


def test_the_shared_basis_spans_all_matrices_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2, 8, 2, generator=generator) @ torch.randn(2, 2, 10, generator=generator)
    basis = shared_basis(low)
    assert basis.shape == (8, 4)
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-5)
    assert torch.allclose(basis @ (basis.T @ low), low, atol=1e-5)
    u, _, _ = torch.linalg.svd(torch.cat(list(low), dim=1), full_matrices=False)
    assert torch.allclose((basis.T @ u[:, :4]).abs(), torch.eye(4), atol=1e-4)


def plain_knots(vectors: InMemory, density: float, combine: str) -> dict[str, Tensor]:
    """KnOTS-TIES as the authors write it, by a decomposition of all experts side by side."""
    bases, coordinates = {}, {}
    for name, matrices in vectors.tensors.items():
        upright = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
        u, s, v = torch.linalg.svd(torch.cat(list(upright), dim=1), full_matrices=False)
        bases[name] = u
        coordinates[name] = torch.stack([s[:, None] * part for part in v.chunk(len(matrices), 1)])
    whole = torch.cat([value.flatten(1) for value in coordinates.values()], dim=1)
    dropped = whole.shape[1] - int(whole.shape[1] * density)
    bounds = whole.abs().sort(dim=1).values[:, max(dropped - 1, 0)]
    result = {}
    for name, value in coordinates.items():
        trimmed = torch.where(value.abs() >= bounds[:, None, None], value, 0.0)
        agrees = trimmed * trimmed.sum(dim=0).sign() > 0
        total = (trimmed * agrees).sum(dim=0)
        if combine == "mean":
            total = total / agrees.sum(dim=0).clamp(min=1)
        merged = bases[name] @ total
        tall = vectors.tensors[name].shape[1] > vectors.tensors[name].shape[2]
        result[name] = merged.T if tall else merged
    return result


@pytest.mark.parametrize(("density", "combine"), [(0.3, "mean"), (0.3, "sum"), (1.0, "mean")])
def test_knots_equals_the_plain_reference(density: float, combine: str) -> None:
    vectors = random_vectors(3, shapes=SHAPES)
    found = merged("knots", vectors, scaling=0.8, density=density, combine=combine)
    for name, expected in plain_knots(vectors, density, combine).items():
        assert torch.allclose(found[name], 0.8 * expected, atol=1e-4)


def test_knots_does_not_depend_on_the_axes_of_the_outputs() -> None:
    vectors = random_vectors(3, shapes={"w": (6, 9)})
    turn = orthonormal(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    turned = InMemory({"w": turn @ vectors.tensors["w"]}, vectors.tasks)
    found = merged("knots", turned, density=0.4)["w"]
    assert torch.allclose(found, turn @ merged("knots", vectors, density=0.4)["w"], atol=1e-5)


def test_decoupled_averages_lengths_and_directions_of_columns() -> None:
    matrices = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    matrices[1] *= 100
    matrices[2, :, 3] = 0
    found = merged("decoupled", InMemory({"w": matrices}, ["a", "b", "c"]), scaling=0.5)["w"]
    for column in range(5):
        ones = matrices[:, :, column]
        lengths = [float(one.norm()) for one in ones]
        directions = [
            one / size if size else 0 * one for one, size in zip(ones, lengths, strict=True)
        ]
        mean = sum(directions[1:], directions[0]) / 3
        assert torch.allclose(found[:, column], 0.5 * sum(lengths) / 3 * mean, atol=1e-5)
