"""Sufficient statistics of a linear layer's inputs, per task and summed over tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError


@dataclass(frozen=True)
class ExpertOutputs:
    """One layer's outputs in the expert, on the samples the student's inputs are for.

    Attributes:
        cross: float64 ``[N, K]``, mean over tokens of ``y x^T``: expert's output without bias,
            student's input.
        mean: float64 ``[N]``, mean over tokens of ``y``.
    """

    cross: Tensor
    mean: Tensor


@dataclass(frozen=True)
class TaskStatistics:
    """Inputs of one layer on one task's calibration samples.

    Attributes:
        gram: float64 ``[K, K]``, mean over tokens of ``x x^T``.
        mean: float64 ``[K]``, mean over tokens of ``x``.
        tokens: number of tokens seen.
        experts: by layer, where the target asks for the experts' own features.
    """

    gram: Tensor
    mean: Tensor
    tokens: int
    experts: Mapping[str, ExpertOutputs] = field(default_factory=dict)


class Accumulator:
    """Sums over tokens, so that a short batch weighs no more.

    Products are float32 (exact enough, and the fast path of every device), their sum over
    batches float64.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._sum: Tensor | None = None
        self._tokens = 0
        self._cross: dict[str, Tensor] = {}
        self._output_sum: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, outputs: Mapping[str, Tensor] | None = None) -> None:
        """Add a batch.

        Args:
            inputs: the student's layer inputs ``[..., K]``.
            outputs: per layer, the expert's outputs without bias ``[..., N]`` for the same tokens.
        """
        flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        self._gram = _plus(self._gram, flat.T @ flat)
        self._sum = _plus(self._sum, flat.sum(dim=0, dtype=torch.float64))
        self._tokens += flat.shape[0]
        for layer, output in (outputs or {}).items():
            rows = output.reshape(-1, output.shape[-1]).to(torch.float32)
            self._cross[layer] = _plus(self._cross.get(layer), rows.T @ flat)
            total = rows.sum(dim=0, dtype=torch.float64)
            self._output_sum[layer] = _plus(self._output_sum.get(layer), total)

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
        experts = {
            layer: ExpertOutputs(cross / self._tokens, self._output_sum[layer] / self._tokens)
            for layer, cross in self._cross.items()
        }
        return TaskStatistics(gram, self._sum / self._tokens, self._tokens, experts)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term.to(torch.float64) if total is None else total.add_(term)


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
        output_mean: per layer ``sum s_t mean(y_t)`` with biases, float64 ``[N]``, likewise.
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
