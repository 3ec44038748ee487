"""Sufficient statistics of linear layers that share an input, per task and summed over tasks.

With rows ``x`` of the student's inputs, ``y`` of the outputs aimed at and token weights ``w``
(``sum w = 1`` per task): ``C = sum w x x^T``, ``G = sum w y x^T``, ``mu = sum w x``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epmq_deploy.errors import NumericsError
from epmq_deploy.models.tokens import weigh

# Columns of a Gram matrix computed at a time; blocks below the diagonal are mirrored.
_TILE = 768


@dataclass(frozen=True)
class TaskStatistics:
    """One task's statistics for layers that share an input.

    Attributes:
        gram: float32 ``[K, K]``, symmetric, weighted mean over tokens of ``x x^T``.
        mean: float64 ``[K]``, of ``x``.
        tokens: number of tokens with a positive weight.
        cross: per layer float32 ``[N, K]``, of ``y x^T``, where the method uses experts.
        output_mean: per layer float64 ``[N]``, of ``y``, without bias.
        low: float32 ``[K]``, the smallest ``x`` of any token, padding included (what runs in int8
            quantizes padding too); None without activations.
        high: float32 ``[K]``, the largest ``x``, padding included; None without activations.
    """

    gram: Tensor
    mean: Tensor
    tokens: int
    cross: Mapping[str, Tensor] = field(default_factory=dict)
    output_mean: Mapping[str, Tensor] = field(default_factory=dict)
    low: Tensor | None = None
    high: Tensor | None = None


class Accumulator:
    """Sums one task's batches, token by token, so that a short batch does not weigh more.

    Args:
        products: dtype in which products of activations are computed: float32, or bfloat16 where
            the processor has matrix units for it (each product is rounded to 8 bits; sums over
            batches stay float32).
    """

    def __init__(self, products: torch.dtype = torch.float32) -> None:
        self._dtype = products
        self._gram: Tensor | None = None
        self._sum: Tensor | None = None
        self._weight = 0.0
        self._tokens = 0
        self._cross: dict[str, Tensor] = {}
        self._output_sum: dict[str, Tensor] = {}
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(
        self,
        inputs: Tensor,
        weights: Tensor | None = None,
        expert_weights: Mapping[str, Tensor | None] | None = None,
        features: Mapping[str, Tensor] | None = None,
        mix: float = 0.0,
    ) -> None:
        """Add a batch.

        The output aimed at is ``y = (1 - mix) x W^T + mix f``.

        Args:
            inputs: the student's ``x``, ``[B, T, K]`` or ``[B, K]``.
            weights: token weights ``[B, T]``; None when all weigh 1.
            expert_weights: per layer the expert's weight ``W [N, K]``; None where ``mix`` is 1.
            features: per layer the expert's own output ``f [B, T, N]`` without bias.
            mix: share of the expert's own output.
        """
        rows, roots = weigh(inputs.to(torch.float32), weights)
        if self._gram is None or self._sum is None:
            self._gram = _zeros(rows.shape[1], rows.shape[1], like=rows)
            self._sum = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        low = rows.to(self._dtype)
        _add_gram(self._gram, low)
        self._sum = self._sum + _total(rows, roots)
        self._tokens += rows.shape[0]
        self._weight += float(roots.square().sum())
        self._widen(inputs)
        for layer, weight in (expert_weights or {}).items():
            feature = (features or {})[layer] if mix > 0 else None
            target = self._target(low, weight, feature, weights, mix)
            self._add_target(layer, low, target, roots)

    def _target(
        self,
        rows: Tensor,
        weight: Tensor | None,
        feature: Tensor | None,
        token_weights: Tensor | None,
        mix: float,
    ) -> Tensor:
        """Return ``y`` for rows that carry the square roots of their weights, ``[n, N]``.

        Raises:
            ValueError: neither the expert's weight nor its output is there.
        """
        target = None
        if weight is not None and mix < 1:
            target = rows @ weight.to(self._dtype).T
            if mix > 0:
                target *= 1 - mix
        if feature is not None:
            output, _ = weigh(feature, token_weights)
            output = output.to(self._dtype)
            target = output if target is None else target.add_(output, alpha=mix)
        if target is None:
            raise ValueError("a mix below 1 needs the expert's weight")
        return target

    def _widen(self, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        # torch.aminmax along the first dimension takes several times as long as the two alone.
        low, high = rows.amin(dim=0).to(torch.float32), rows.amax(dim=0).to(torch.float32)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def _add_target(self, layer: str, rows: Tensor, target: Tensor, roots: Tensor) -> None:
        if layer not in self._cross:
            self._cross[layer] = _zeros(target.shape[1], rows.shape[1], like=rows)
            self._output_sum[layer] = torch.zeros((), dtype=torch.float64, device=rows.device)
        _add_product(self._cross[layer], target, rows)
        self._output_sum[layer] = self._output_sum[layer] + _total(target, roots)

    def statistics(self) -> TaskStatistics:
        """Weighted means over all tokens added; ends the accumulation.

        Raises:
            NumericsError: no token with a positive weight was added, or sums are not finite.
        """
        if self._gram is None or self._sum is None or self._weight == 0:
            raise NumericsError("no calibration tokens reached the layer")
        gram = self._gram.div_(self._weight)
        _mirror(gram)
        # Its trace is a sum of squares: NaN or infinite as soon as one activation is.
        if not math.isfinite(float(gram.trace())):
            raise NumericsError("activations are NaN or infinite")
        return TaskStatistics(
            gram,
            self._sum / self._weight,
            self._tokens,
            {layer: cross.div_(self._weight) for layer, cross in self._cross.items()},
            {layer: total / self._weight for layer, total in self._output_sum.items()},
            self._low,
            self._high,
        )


def _zeros(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """Return zeros that may be changed in place whether or not inference mode is on."""
    with torch.inference_mode(False):
        return torch.zeros(rows, columns, device=like.device)


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the blocks of ``total`` on and above the diagonal."""
    columns = rows.shape[1]
    for start in range(0, columns, _TILE):
        stop = min(start + _TILE, columns)
        _add_product(total[start:stop, start:], rows[:, start:stop], rows[:, start:])


def _mirror(gram: Tensor) -> None:
    """Copy the upper triangle to the lower one, in place.

    Blocks below the diagonal were not computed, and an ill-conditioned solve would amplify a
    product that is not symmetric to the last bit.
    """
    columns = gram.shape[1]
    for start in range(0, columns, _TILE):
        stop = min(start + _TILE, columns)
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to a float32 matrix."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def _total(rows: Tensor, roots: Tensor) -> Tensor:
    """Return the weighted sum of tokens, float64, from rows times the roots of their weights."""
    return (roots @ rows.to(torch.float32)).to(torch.float64)


@dataclass
class GroupSums:
    """Weighted sums over tasks for layers that share their input.

    With task weights ``s_t``, inputs' Gram ``C_t`` and mean ``mu_t``:

    Attributes:
        gram: ``sum s_t C_t``, ``[K, K]`` in the dtype of the tasks' statistics.
        mean: ``sum s_t mu_t``, float64 ``[K]``.
        weight: ``sum s_t``.
        tokens: tokens of all tasks together.
        cross: per layer ``sum s_t G_t``, ``[N, K]`` in the same dtype, where the method uses
            experts.
        output_mean: per layer ``sum s_t mean(y_t)`` with biases, float64 ``[N]``, where the method
            uses experts.
        biases: per layer and task ``s_t b_t`` and ``mu_t``, for methods that fit biases jointly.
        low: smallest input of any task, float32 ``[K]``; None without activations.
        high: largest input of any task, float32 ``[K]``; None without activations.
    """

    gram: Tensor
    mean: Tensor
    weight: float = 0.0
    tokens: int = 0
    cross: dict[str, Tensor] = field(default_factory=dict)
    output_mean: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    low: Tensor | None = None
    high: Tensor | None = None

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> "GroupSums":
        """Return empty sums for layers with ``features`` inputs."""
        return cls(
            torch.zeros(features, features, dtype=torch.float64, device=device),
            torch.zeros(features, dtype=torch.float64, device=device),
        )

    def add(
        self,
        statistics: TaskStatistics,
        weight: float,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add one task.

        Args:
            statistics: of the task.
            weight: ``s_t``.
            biases: per layer what is added to the outputs aimed at, ``[N]``.
        """
        # There are few terms, each as exact as a float32 product; adding them loses no digits.
        if self.gram.dtype != statistics.gram.dtype:
            self.gram = self.gram.to(statistics.gram.dtype)
        self.gram.add_(statistics.gram, alpha=weight)
        self.mean.add_(statistics.mean, alpha=weight)
        self.weight += weight
        self.tokens += statistics.tokens
        if statistics.low is not None and statistics.high is not None:
            low, high = statistics.low, statistics.high
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
        for layer, cross in statistics.cross.items():
            if layer not in self.cross:
                self.cross[layer] = torch.zeros_like(cross)
                self.output_mean[layer] = torch.zeros_like(statistics.output_mean[layer])
            self.cross[layer].add_(cross, alpha=weight)
            self.output_mean[layer].add_(statistics.output_mean[layer], alpha=weight)
            if biases is not None and layer in biases:
                bias = biases[layer].to(torch.float64)
                self.output_mean[layer].add_(bias, alpha=weight)
                self.biases.setdefault(layer, []).append((weight * bias, statistics.mean))

    def bias_cross(self, layer: str) -> Tensor:
        """Return what biases add to ``cross``: ``sum s_t b_t mu_t^T``, float64 ``[N, K]``."""
        pairs = self.biases[layer]
        scaled, means = (torch.stack(part) for part in zip(*pairs, strict=True))
        return scaled.T @ means
