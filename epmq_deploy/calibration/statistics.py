"""Sufficient statistics of a linear layer's inputs, per task and summed over tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError


@dataclass(frozen=True)
class TaskStatistics:
    """Inputs of one layer on one task's calibration samples.

    Attributes:
        gram: float64 ``[K, K]``, mean over tokens of ``x x^T``.
        mean: float64 ``[K]``, mean over tokens of ``x``.
        tokens: number of tokens seen.
    """

    gram: Tensor
    mean: Tensor
    tokens: int


class InputAccumulator:
    """Sums ``x x^T`` and ``x`` token by token, so that a short batch weighs no more.

    Products are float32 (exact enough, and the fast path of every device), their sum over
    batches float64.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch of layer inputs ``[..., K]``."""
        flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        gram, total = (flat.T @ flat).to(torch.float64), flat.sum(dim=0, dtype=torch.float64)
        if self._gram is None or self._sum is None:
            self._gram, self._sum = gram, total
        else:
            self._gram += gram
            self._sum += total
        self._tokens += flat.shape[0]

    def statistics(self) -> TaskStatistics:
        """Means over all tokens added.

        Raises:
            NumericsError: nothing was added.
        """
        if self._gram is None or self._sum is None:
            raise NumericsError("no calibration tokens reached the layer")
        # float32 products need not be symmetric to the last bit, which an ill-conditioned solve
        # would amplify.
        gram = (self._gram + self._gram.T) / (2 * self._tokens)
        return TaskStatistics(gram, self._sum / self._tokens, self._tokens)


@dataclass
class GroupSums:
    """Weighted sums over tasks for layers that share their input.

    With task weights ``s_t``, inputs' Gram ``C_t`` and mean ``mu_t``:

    Attributes:
        gram: ``sum s_t C_t``, float64 ``[K, K]``.
        mean: ``sum s_t mu_t``, float64 ``[K]``.
        weight: ``sum s_t``.
        tokens: tokens of all tasks together.
        cross: per layer ``sum s_t G_t``, float64 ``[N, K]``, for expert-guided targets.
        output_mean: per layer ``sum s_t (W_t mu_t + b_t)``, float64 ``[N]``, likewise.
    """

    gram: Tensor
    mean: Tensor
    weight: float = 0.0
    tokens: int = 0
    cross: dict[str, Tensor] = field(default_factory=dict)
    output_mean: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> "GroupSums":
        """Empty sums for layers with ``features`` inputs."""
        return cls(
            torch.zeros(features, features, dtype=torch.float64, device=device),
            torch.zeros(features, dtype=torch.float64, device=device),
        )

    def add(
        self,
        statistics: TaskStatistics,
        weight: float,
        cross: Mapping[str, Tensor],
        output_mean: Mapping[str, Tensor],
    ) -> None:
        """Add one task with weight ``s_t``; ``cross`` and ``output_mean`` per layer, unweighted."""
        self.gram += weight * statistics.gram
        self.mean += weight * statistics.mean
        self.weight += weight
        self.tokens += statistics.tokens
        for sums, terms in ((self.cross, cross), (self.output_mean, output_mean)):
            for layer, term in terms.items():
                sums[layer] = sums[layer] + weight * term if layer in sums else weight * term
