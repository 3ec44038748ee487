"""Merge methods that drop entries: DARE, DELLA, Breadcrumbs."""

import math

import pytest
import torch
from task_vectors import InMemory, flat, merged, random_vectors

from epmq_deploy.merging.ops.sparsify import (
    drop_at_random,
    drop_extremes,
    generator_for,
    keep_by_rank,
)

RANDOM = ("dare", "dare_ties", "della")


def plain_elect(kept: list[float], combine: str) -> float:
    """One parameter's disjoint merge, the positive sign where values cancel."""
    sign = 1 if sum(kept) >= 0 else -1
    agreeing = [value for value in kept if value * sign > 0]
    if not agreeing:
        return 0.0
    return sum(agreeing) / (len(agreeing) if combine == "mean" else 1)


@pytest.mark.parametrize("method", RANDOM)
def test_draws_depend_on_seed_and_names_alone(method: str) -> None:
    vectors = random_vectors(3, shapes={"a": (8, 8), "b": (8, 8)})
    both = merged(method, vectors)
    alone = merged(method, InMemory({"b": vectors.tensors["b"]}, vectors.tasks))
    assert torch.equal(both["b"], alone["b"])
    assert torch.equal(flat(merged(method, vectors)), flat(both))
    assert not torch.equal(flat(merged(method, vectors, seed=1)), flat(both))
    same = InMemory({"a": vectors.tensors["b"], "b": vectors.tensors["b"]}, vectors.tasks)
    equal = merged(method, same)
    assert not torch.equal(equal["a"], equal["b"])


def test_dare_is_the_rescaled_sum_of_what_its_draws_keep() -> None:
    vectors = random_vectors(2)
    found = merged("dare", vectors, density=0.3, scaling=0.5, seed=4)
    for name, value in vectors.tensors.items():
        expected = torch.zeros(value.shape[1:])
        for task, vector in zip(vectors.tasks, value, strict=True):
            keep = torch.rand(vector.shape, generator=generator_for(4, name, task)) < 0.3
            expected += 0.5 * keep * vector / 0.3
        assert torch.allclose(found[name], expected, atol=1e-6)


def test_dare_keeps_the_share_and_the_expectation() -> None:
    ones = torch.ones(1, 200, 200)
    kept = drop_at_random(ones, lambda vector: 0.2, seed=0, name="w", tasks=["t"])
    share = float((kept != 0).float().mean())
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 40_000)
    assert set(kept.unique().tolist()) == {0.0, 5.0}


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_dare_ties_elects_among_the_kept(combine: str) -> None:
    vectors = random_vectors(4)
    found = merged("dare_ties", vectors, density=0.6, scaling=2.0, combine=combine)
    for name, value in vectors.tensors.items():
        kept = drop_at_random(value, lambda v: 0.6, seed=0, name=name, tasks=vectors.tasks)
        columns = kept.reshape(4, -1).T.tolist()
        expected = [2.0 * plain_elect(column, combine) for column in columns]
        assert found[name].flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_della_keeps_larger_entries_more_often() -> None:
    vector = torch.tensor([[3.0, -1.0, 2.0, -4.0, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
    keep = keep_by_rank(vector, density=0.5, epsilon=0.4)
    assert torch.allclose(keep[0], torch.tensor([0.6, 0.4, 0.5, 0.7, 0.3]))
    assert torch.allclose(keep[1], torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7]))
    assert keep_by_rank(torch.tensor(2.0), 0.5, 0.4).tolist() == 0.5
    # What feeds one output of a convolution is one row.
    assert torch.allclose(keep_by_rank(vector.reshape(2, 5, 1), 0.5, 0.4).reshape(2, 5), keep)


@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_della_equals_the_plain_reference(combine: str, elect: bool) -> None:
    vectors = random_vectors(3)
    found = merged(
        "della", vectors, density=0.5, epsilon=0.3, scaling=1.5, combine=combine, elect=elect
    )
    for name, value in vectors.tensors.items():
        kept = []
        for task, vector in zip(vectors.tasks, value, strict=True):
            share = keep_by_rank(vector, 0.5, 0.3)
            draws = torch.rand(vector.shape, generator=generator_for(0, name, task))
            kept.append((vector / share * (draws < share)).flatten().tolist())
        for result, column in zip(found[name].flatten(), zip(*kept, strict=True), strict=True):
            if elect:
                expected = plain_elect(list(column), combine)
            else:
                there = [item for item in column if item]
                expected = sum(there) / (max(len(there), 1) if combine == "mean" else 1)
            assert float(result) == pytest.approx(1.5 * expected, abs=1e-5)


def test_breadcrumbs_drop_each_tensor_s_extremes() -> None:
    vectors = random_vectors(2, shapes={"a": (10, 20), "b": (40,)})
    found = merged("breadcrumbs", vectors, beta=0.6, gamma=0.95, scaling=0.5)
    for name, value in vectors.tensors.items():
        count = value[0].numel()
        expected = torch.zeros(count)
        for vector in value.reshape(2, -1):
            middle = vector.abs().argsort()[int(count * 0.6) : math.ceil(count * 0.95)]
            expected[middle] += 0.5 * vector[middle]
        assert torch.allclose(found[name].flatten(), expected, atol=1e-6)


def test_breadcrumbs_ties_elects_among_the_kept() -> None:
    vectors = random_vectors(3, shapes={"a": (10, 20)})
    found = merged("breadcrumbs_ties", vectors, beta=0.3, gamma=0.9, scaling=1.0)
    kept = drop_extremes(vectors.tensors["a"], 0.3, 0.9).reshape(3, -1).T.tolist()
    expected = [plain_elect(column, "sum") for column in kept]
    assert found["a"].flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_small_tensors_survive_breadcrumbs() -> None:
    vectors = InMemory({"scale": torch.tensor([0.5, 0.25])}, ["a", "b"])
    assert merged("breadcrumbs", vectors, scaling=1.0)["scale"].tolist() == 0.75
