"""Merge methods against plain references written from the papers' formulas."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from epmq_deploy.merging.methods import MERGE_METHODS
from epmq_deploy.merging.methods.ties import TiesOptions, global_statistics, magnitude_threshold

SHAPES = ((4, 6), (5,), (3, 2, 2))


@dataclass
class InMemory:
    """Task vectors held in memory, tensor by tensor ``[T, *]``."""

    tensors: list[Tensor]

    @property
    def tasks(self) -> int:
        return self.tensors[0].shape[0]

    def of_task(self, index: int) -> Iterator[Tensor]:
        return (tensor[index] for tensor in self.tensors)

    def stacked(self) -> Iterator[Tensor]:
        return iter(self.tensors)


def task_vectors(tasks: int, seed: int = 0) -> InMemory:
    generator = torch.Generator().manual_seed(seed)
    return InMemory([torch.randn(tasks, *shape, generator=generator) for shape in SHAPES])


def merged(method: str, vectors: InMemory, **options: object) -> list[Tensor]:
    """Task vectors of the merge (base zero), tensor by tensor."""
    entry = MERGE_METHODS[method]
    chosen = entry.options(**options)
    known = entry.statistics(vectors, chosen) if entry.statistics else None
    return [
        entry.merge(torch.zeros(tensor.shape[1:]), tensor, chosen, known)
        for tensor in vectors.tensors
    ]


def plain_ties(vectors: InMemory, density: float, scaling: float, combine: str) -> Tensor:
    """TIES over flat lists of numbers, one parameter at a time."""
    flat = torch.cat([tensor.flatten(1) for tensor in vectors.tensors], dim=1)
    count = flat.shape[1]
    trimmed = []
    for task in flat:
        drop = count - int(count * density)
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
    vectors = task_vectors(4)
    found = merged("ties", vectors, density=density, scaling=0.7, combine=combine)
    flat = torch.cat([tensor.flatten() for tensor in found])
    assert torch.allclose(flat, plain_ties(vectors, density, 0.7, combine), atol=1e-6)


def test_ties_threshold_is_global_over_all_tensors() -> None:
    small, large = torch.full((1, 10), 0.1), torch.full((1, 10), 5.0)
    found = merged("ties", InMemory([small, large]), density=0.5, scaling=1.0)
    # A threshold per tensor would keep half of each.
    assert (found[1] == 5.0).all()
    statistics = global_statistics(InMemory([small, large]), TiesOptions(density=0.4))
    assert statistics.thresholds.tolist() == [5.0]


def test_magnitude_threshold_keeps_the_largest_share() -> None:
    magnitudes = torch.tensor([4.0, 1.0, 3.0, 2.0, 5.0])
    assert magnitude_threshold(magnitudes, 0.2) == 4.0
    assert magnitude_threshold(magnitudes, 1.0) == 0.0


def test_task_arithmetic_is_the_scaled_sum() -> None:
    vectors = task_vectors(3)
    for found, tensor in zip(
        merged("task_arithmetic", vectors, scaling=0.4), vectors.tensors, strict=True
    ):
        assert torch.allclose(found, 0.4 * (tensor[0] + tensor[1] + tensor[2]), atol=1e-6)


UNIT = {"average": {}, "task_arithmetic": {"scaling": 1.0}, "ties": {"scaling": 1.0, "density": 1}}


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_one_expert_at_full_strength_is_the_expert(method: str) -> None:
    vectors = task_vectors(1)
    for found, tensor in zip(merged(method, vectors, **UNIT[method]), vectors.tensors, strict=True):
        assert torch.allclose(found, tensor[0])


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_order_of_experts_does_not_matter(method: str) -> None:
    vectors = task_vectors(3)
    reference = merged(method, vectors)
    for order in itertools.permutations(range(3)):
        shuffled = InMemory([tensor[list(order)] for tensor in vectors.tensors])
        for one, other in zip(merged(method, shuffled), reference, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_average_of_identical_experts_is_the_expert() -> None:
    vectors = InMemory([tensor.expand(4, *tensor.shape[1:]) for tensor in task_vectors(1).tensors])
    for found, tensor in zip(merged("average", vectors), vectors.tensors, strict=True):
        assert torch.allclose(found, tensor[0])
    for found, tensor in zip(
        merged("ties", vectors, combine="mean", scaling=1.0, density=1.0),
        vectors.tensors,
        strict=True,
    ):
        assert torch.allclose(found, tensor[0])
