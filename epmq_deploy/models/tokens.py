"""Which tokens of a batch count, and how much."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenWeights:
    """Tokens of one batch.

    Attributes:
        real: bool ``[B, T]``, False for padding; None when all tokens are real.
        pooled: int64 ``[B]``, the token that reaches the head; None when all may.
    """

    real: Tensor | None = None
    pooled: Tensor | None = None

    def weights(self, shape: torch.Size, others: float, device: torch.device) -> Tensor | None:
        """Return the weight of each token, float32 ``[B, T]``; None when all weigh 1.

        Args:
            shape: ``[B, T, ...]`` of the activations.
            others: weight of tokens that are not pooled, 1 where all of them matter.
            device: of the result.
        """
        if self.real is None and (self.pooled is None or others == 1):
            return None
        weights = torch.ones(shape[0], shape[1], device=device)
        if self.pooled is not None and others != 1:
            weights *= others
            weights[torch.arange(shape[0], device=device), self.pooled.to(device)] = 1.0
        if self.real is not None:
            weights *= self.real.to(device)
        return weights


def weights_of_runs(tokens: Tensor, rows: int) -> Tensor:
    """Return weights of what a layer receives in several runs, ``[1, rows]``.

    Only its first run is on tokens. The rows of the others, such as a table of positions that all
    tokens share, weigh together as much as the tokens do.

    Args:
        tokens: weights of the tokens, ``[B, T]``.
        rows: of all runs together.
    """
    others = rows - tokens.numel()
    share = (tokens.sum() / others).expand(others)
    return torch.cat([tokens.flatten(), share])[None]


def counted(activations: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rows ``[n, K]`` of tokens with a positive weight, and those weights ``[n]``, float32.

    Args:
        activations: ``[B, T, K]``, or ``[B, K]`` without ``weights``.
        weights: float32 ``[B, T]``; None when all weigh 1.
    """
    if weights is None:
        rows = activations.reshape(-1, activations.shape[-1])
        return rows, torch.ones(rows.shape[0], device=rows.device)
    positive = weights > 0
    return activations[positive], weights[positive]


def weigh(activations: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rows that count, each times the square root of its weight, and those roots.

    With rows ``r = sqrt(w) x``, ``r^T r`` is ``sum w x x^T``. Shapes as for ``counted``.
    """
    rows, positive = counted(activations, weights)
    if weights is None:
        return rows, positive
    roots = positive.sqrt()
    return rows * roots[:, None], roots
