"""Task vectors in memory, and merges of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.merging.base import FromTaskVectors, Merger
from epmq_deploy.merging.methods import MERGE_METHODS

SHAPES = {"fc.weight": (4, 6), "fc.bias": (5,), "conv.weight": (3, 2, 2), "scale": ()}
# What makes methods that can, reproduce a single expert.
UNIT: dict[str, dict[str, object]] = {
    "average": {},
    "breadcrumbs": {"scaling": 1, "beta": 0, "gamma": 1},
    "breadcrumbs_ties": {"scaling": 1, "beta": 0, "gamma": 1},
    "consensus": {"scaling": 1, "active_tasks": 1},
    "dare": {"scaling": 1, "density": 1},
    "dare_ties": {"scaling": 1, "density": 1},
    "dc_merge": {"scaling": 1},
    "decoupled": {"scaling": 1},
    "della": {"scaling": 1, "density": 1, "epsilon": 0},
    "knots": {"scaling": 1, "density": 1},
    "task_arithmetic": {"scaling": 1},
    "ties": {"scaling": 1, "density": 1},
    "tsv_m": {"scaling": 1},
    "wudi": {"scaling": 1},
}


@dataclass
class InMemory:
    """Task vectors ``[T, *]`` by tensor name."""

    tensors: dict[str, Tensor]
    tasks: Sequence[str]

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors."""
        return tuple(self.tensors)

    def size(self, name: str) -> int:
        """Number of parameters in a tensor."""
        return self.tensors[name][0].numel()

    def of_task(self, index: int, names: Sequence[str]) -> Iterator[Tensor]:
        """One expert's task vector."""
        return (self.tensors[name][index] for name in names)

    def of_tensor(self, name: str) -> Tensor:
        """All experts' task vectors of one tensor."""
        return self.tensors[name]

    def reordered(self, order: Sequence[int]) -> "InMemory":
        """The same experts in another order."""
        tensors = {name: value[list(order)] for name, value in self.tensors.items()}
        return InMemory(tensors, [self.tasks[index] for index in order])

    def flat(self) -> Tensor:
        """``[T, n]`` over all tensors."""
        return torch.cat([value.reshape(len(value), -1) for value in self.tensors.values()], dim=1)


def random_vectors(tasks: int, seed: int = 0, shapes: object = None) -> InMemory:
    """Normal task vectors of tensors of several ranks."""
    generator = torch.Generator().manual_seed(seed)
    chosen = shapes or SHAPES
    assert isinstance(chosen, dict)
    tensors = {
        name: torch.randn(tasks, *shape, generator=generator) for name, shape in chosen.items()
    }
    return InMemory(tensors, [f"task{index}" for index in range(tasks)])


def identical_vectors(tasks: int) -> InMemory:
    """The same task vector for every task."""
    one = random_vectors(1)
    tensors = {name: value.expand(tasks, *value.shape[1:]) for name, value in one.tensors.items()}
    return InMemory(tensors, [f"task{index}" for index in range(tasks)])


def merged(
    method: str, vectors: InMemory, base: float = 0.0, **options: object
) -> dict[str, Tensor]:
    """The merge onto a constant base, by tensor name."""
    entry = MERGE_METHODS[method]
    chosen = entry.options(**options)
    statistics = None
    if isinstance(entry.statistics, FromTaskVectors):
        statistics = entry.statistics.compute(vectors, chosen)
    merger = Merger(entry, chosen, vectors.tasks, statistics)
    return {
        name: merger.merge(name, torch.full(value.shape[1:], base), value)
        for name, value in vectors.tensors.items()
    }


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All tensors one after the other, ``[n]``."""
    return torch.cat([value.flatten() for value in tensors.values()])
