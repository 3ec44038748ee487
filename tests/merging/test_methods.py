"""Merge methods: what holds for all of them, and those without random draws or spectra."""

import itertools
import math

import pytest
import torch
from task_vectors import UNIT, InMemory, flat, identical_vectors, merged, random_vectors
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.merging.base import CHUNK
from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.methods.slerp import slerp
from epmq_deploy.merging.methods.ties import TiesOptions, global_statistics
from epmq_deploy.merging.ops.selection import kth_smallest, magnitude_ranks, streamed_ranks
from epmq_deploy.options.merging import ScaledOptions

# Those that need calibration data are in test_methods_with_data.py.
SCALED = sorted(
    name
    for name, method in MERGE_METHODS.items()
    if issubclass(method.options, ScaledOptions) and not method.needs_data
)
DATA_FREE = sorted(name for name, method in MERGE_METHODS.items() if not method.needs_data)
ELEMENTWISE = sorted(name for name, method in MERGE_METHODS.items() if method.elementwise)
GIVE_THEMSELVES = {
    "average": {},
    "model_stock": {},
    "slerp": {},
    "decoupled": {"scaling": 1},
    "knots": {"scaling": 1, "density": 1},
    "ties": {"combine": "mean", "scaling": 1, "density": 1},
    "dare_ties": {"combine": "mean", "scaling": 1, "density": 1},
    "della": {"combine": "mean", "scaling": 1, "density": 1, "epsilon": 0},
    "breadcrumbs_ties": {"combine": "mean", "scaling": 1, "beta": 0, "gamma": 1},
}


@pytest.mark.parametrize("method", sorted(UNIT))
def test_one_expert_at_full_strength_is_the_expert(method: str) -> None:
    vectors = random_vectors(1)
    for name, found in merged(method, vectors, base=2.0, **UNIT[method]).items():
        assert torch.allclose(found, 2.0 + vectors.tensors[name][0], atol=1e-5), name


@pytest.mark.parametrize("method", DATA_FREE)
def test_order_of_experts_does_not_matter(method: str) -> None:
    vectors = random_vectors(2 if method == "slerp" else 3)
    reference = flat(merged(method, vectors))
    for order in itertools.permutations(range(len(vectors.tasks))):
        assert torch.allclose(flat(merged(method, vectors.reordered(order))), reference, atol=1e-5)


@pytest.mark.parametrize("method", sorted(GIVE_THEMSELVES))
def test_identical_experts_give_themselves(method: str) -> None:
    vectors = identical_vectors(2 if method == "slerp" else 4)
    for name, found in merged(method, vectors, **GIVE_THEMSELVES[method]).items():
        assert torch.allclose(found, vectors.tensors[name][0], atol=1e-5), name


@pytest.mark.parametrize("method", DATA_FREE)
def test_arguments_are_not_modified_and_results_are_float32(method: str) -> None:
    vectors = random_vectors(2)
    before = {name: value.clone() for name, value in vectors.tensors.items()}
    found = merged(method, vectors)
    for name, value in before.items():
        assert torch.equal(vectors.tensors[name], value)
        assert found[name].dtype == torch.float32
        assert found[name].shape == value.shape[1:]


@pytest.mark.parametrize("method", SCALED)
def test_results_are_linear_in_the_scaling(method: str) -> None:
    vectors = random_vectors(3)
    one = flat(merged(method, vectors, base=1.0, scaling=1.0)) - 1.0
    found = flat(merged(method, vectors, base=1.0, scaling=0.4))
    assert torch.allclose(found, 1.0 + 0.4 * one, atol=1e-5)


@pytest.mark.parametrize("method", DATA_FREE)
def test_experts_equal_to_the_base_give_the_base(method: str) -> None:
    vectors = random_vectors(2)
    zero = InMemory({n: torch.zeros_like(v) for n, v in vectors.tensors.items()}, vectors.tasks)
    assert torch.equal(flat(merged(method, zero, base=0.5)), torch.full((42,), 0.5))


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_large_tensors_in_pieces_equal_the_whole(method: str) -> None:
    vectors = random_vectors(2, shapes={"w": (3, CHUNK // 2)})
    found = flat(merged(method, vectors))
    # The same numbers in tensors of less than a piece.
    rows = {f"w{i}": row for i, row in enumerate(vectors.tensors["w"].unbind(dim=1))}
    assert torch.equal(found, flat(merged(method, InMemory(rows, vectors.tasks))))


def test_average_weighs_as_told() -> None:
    vectors = random_vectors(3)
    found = merged("average", vectors, base=1.0, weights={"task0": 1, "task1": 3, "task2": 0})
    for name, (one, other, _) in vectors.tensors.items():
        assert torch.allclose(found[name], 1.0 + 0.25 * one + 0.75 * other, atol=1e-6)


def test_task_arithmetic_is_the_scaled_sum() -> None:
    vectors = random_vectors(3)
    plain = merged("task_arithmetic", vectors, scaling=0.4)
    own = merged(
        "task_arithmetic", vectors, scaling=0.4, weights={"task0": 1, "task1": -2, "task2": 0.5}
    )
    for name, (one, two, three) in vectors.tensors.items():
        assert torch.allclose(plain[name], 0.4 * (one + two + three), atol=1e-6)
        assert torch.allclose(own[name], 0.4 * (one - 2 * two + 0.5 * three), atol=1e-6)


def plain_ties(vectors: InMemory, density: float, scaling: float, combine: str) -> Tensor:
    """TIES over flat lists of numbers, one parameter at a time."""
    trimmed = []
    for task in vectors.flat():
        drop = len(task) - int(len(task) * density)
        bound = sorted(task.abs().tolist())[drop - 1] if drop else 0.0
        trimmed.append([value if abs(value) >= bound else 0.0 for value in task.tolist()])
    totals = [sum(column) for column in zip(*trimmed, strict=True)]
    signs = [(total > 0) - (total < 0) for total in totals]
    majority = 1 if sum(signs) >= 0 else -1
    result = []
    for sign, column in zip(signs, zip(*trimmed, strict=True), strict=True):
        elected = sign or majority
        agreeing = [value for value in column if value * elected > 0]
        total = sum(agreeing)
        if combine == "mean" and agreeing:
            total /= len(agreeing)
        result.append(scaling * total)
    return torch.tensor(result)


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_the_plain_reference(density: float, combine: str) -> None:
    vectors = random_vectors(4)
    found = merged("ties", vectors, density=density, scaling=0.7, combine=combine)
    assert torch.allclose(flat(found), plain_ties(vectors, density, 0.7, combine), atol=1e-6)


def test_ties_gives_cancelling_values_the_majority_sign() -> None:
    values = torch.tensor([[1.0, -3.0, -5.0, 2.0], [-1.0, -4.0, -2.0, -2.0]])
    vectors = InMemory({"w": values}, ["a", "b"])
    found = merged("ties", vectors, density=1, scaling=1, combine="sum")
    assert found["w"].tolist() == [-1.0, -7.0, -7.0, -2.0]
    assert torch.equal(found["w"], plain_ties(vectors, 1, 1, "sum"))


def test_ties_counts_the_majority_over_tensors_of_all_densities() -> None:
    vectors = InMemory(
        {"w": torch.tensor([[1.0], [-1.0]]), "v": torch.full((2, 3), -1.0)}, ["a", "b"]
    )
    found = merged("ties", vectors, density=1, scaling=1, layers={"w": {"density": 0.9}})
    assert found["w"].tolist() == [-1.0]


def test_ties_thresholds_are_global_over_tensors_of_one_density() -> None:
    small, large = torch.full((1, 10), 0.1), torch.full((1, 10), 5.0)
    vectors = InMemory({"small": small, "large": large}, ["t"])
    found = merged("ties", vectors, density=0.5, scaling=1.0)
    # A threshold per tensor would keep half of each.
    assert (found["large"] == 5.0).all()
    statistics = global_statistics(vectors, TiesOptions(density=0.4))
    assert statistics.thresholds[0.4].tolist() == [5.0]
    own = TiesOptions(density=0.4, layers={"small": {"density": 0.9}})
    assert {d: t.tolist() for d, t in global_statistics(vectors, own).thresholds.items()} == {
        0.9: [pytest.approx(0.1)],
        0.4: [5.0],
    }


def test_order_statistics_are_exact() -> None:
    vectors = random_vectors(3, shapes={"a": (50, 7), "b": (33,)})
    table = vectors.flat()
    table[0, :40] = 0.0
    table[1, 5] = -0.0
    pieces = list(table.split(17, dim=1))
    for rank in (0, 10, 200, table.shape[1] - 1):
        expected = table.sort(dim=1).values[:, rank]
        assert torch.equal(streamed_ranks(lambda: iter(pieces), rank), expected)
        found = magnitude_ranks(vectors, 2, vectors.names, [0, rank])
        sizes = vectors.flat()[2].abs().sort().values
        assert found == [float(sizes[0]), float(sizes[rank])]


@pytest.mark.parametrize("kind", ["normal", "sorted", "constant", "sparse", "periodic"])
def test_the_kth_smallest_is_exact_whatever_a_sample_says(kind: str) -> None:
    count = 300_000
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).abs()
    if kind == "sorted":
        values = values.sort().values
    elif kind == "constant":
        values[10:] = 1.0
    elif kind == "sparse":
        values[values < 1] = 0.0
    elif kind == "periodic":
        # What a regular sample sees is nothing like the rest.
        values[:: count // 2**16] += 100.0
    ordered = values.sort().values
    for rank in (0, 7, count // 3, int(count * 0.8), count - 1):
        assert kth_smallest(values.numpy(), rank) == float(ordered[rank])


def test_slerp_follows_the_arc() -> None:
    one, other = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for t in (0.0, 0.3, 0.5, 1.0):
        angle = t * math.pi / 2
        expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        assert torch.allclose(slerp(one, other, t), expected, atol=1e-6)
    # Almost parallel: arc and line meet.
    near = torch.tensor([2.0, 3e-4])
    assert torch.allclose(slerp(one, near, 0.5), (one + near) / 2, atol=1e-6)


def test_slerp_of_weights_and_of_task_vectors() -> None:
    vectors = random_vectors(2)
    weights = merged("slerp", vectors, base=3.0, t=0.25)
    changes = merged("slerp", vectors, base=3.0, t=0.25, between="task_vectors")
    for name, (one, other) in vectors.tensors.items():
        assert torch.allclose(changes[name], 3.0 + slerp(one, other, 0.25))
        assert torch.allclose(weights[name], slerp(3.0 + one, 3.0 + other, 0.25))


def test_slerp_of_opposite_experts_is_an_error_that_names_the_tensor() -> None:
    vectors = InMemory({"w": torch.tensor([[1.0, 2.0], [-1.0, -2.0]])}, ["a", "b"])
    with pytest.raises(NumericsError, match="w: the experts are opposite"):
        merged("slerp", vectors)


def test_consensus_keeps_what_two_tasks_use() -> None:
    vectors = random_vectors(5)
    found = flat(merged("consensus", vectors, scaling=0.5, mask_lambda=0.6, active_tasks=2))
    for parameter, result in zip(vectors.flat().T.tolist(), found.tolist(), strict=True):
        total = sum(parameter)
        active = sum(abs(value) > 0.6 * abs(total - value) for value in parameter)
        assert result == pytest.approx(0.5 * total if active >= 2 else 0.0, abs=1e-5)
    assert 0 < int((found == 0).sum()) < len(found)


def test_model_stock_interpolates_by_the_mean_cosine() -> None:
    vectors = random_vectors(3)
    # Experts with something in common.
    vectors.tensors = {n: v + 2 * v[0].abs() for n, v in vectors.tensors.items()}
    found = merged("model_stock", vectors)
    for name, value in vectors.tensors.items():
        rows = value.reshape(3, -1)
        pairs = [
            float(torch.cosine_similarity(rows[i], rows[j], dim=0))
            for i, j in itertools.combinations(range(3), 2)
        ]
        cosine = max(sum(pairs) / 3, 0.0)
        ratio = 3 * cosine / (1 + 2 * cosine)
        assert torch.allclose(found[name], ratio * value.mean(dim=0), atol=1e-5)


def test_model_stock_of_experts_that_pull_apart_is_the_base() -> None:
    vectors = InMemory({"w": torch.tensor([[1.0, 0.0], [-1.0, 0.1]])}, ["a", "b"])
    assert merged("model_stock", vectors)["w"].tolist() == [0.0, 0.0]


def test_pcb_equals_the_plain_reference() -> None:
    vectors = random_vectors(3, shapes={"a": (20, 30), "b": (50,)})
    values = vectors.flat().double()
    tasks, count = values.shape
    sizes = values.abs()
    for row in sizes:
        ordered = row.sort().values
        row.clamp_(float(ordered[int(count * 1e-4)]), float(ordered[int(count * (1 - 1e-4) - 1)]))
    low, high = sizes.amin(1, keepdim=True), sizes.amax(1, keepdim=True)
    within = torch.exp(tasks * ((sizes - low) / (high - low)) ** 2)
    score = within * torch.tanh(values * values.sum(dim=0))
    bottom = score.sort(dim=1).values[:, [int(count * 0.8)]]
    weight = (score.maximum(bottom) - bottom) / (score.amax(1, keepdim=True) - bottom)
    expected = (weight * values.sign() * sizes).sum(0) / weight.sum(0).clamp(min=1e-12)
    found = merged("pcb", vectors, ratio=0.2, scaling=1.2)
    assert torch.allclose(flat(found), 1.2 * expected.float(), atol=1e-4)
    assert 0.3 < float((flat(found) == 0).float().mean()) < 0.7
