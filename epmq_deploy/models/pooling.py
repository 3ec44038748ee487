"""How the tokens of a text become its embedding, as sentence-transformers does it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a text becomes an embedding.

    Attributes:
        pooling: ways to pool the tokens' hidden states; the results of several are joined.
        normalize: whether embeddings get the length 1.
        longest: tokens of a text that are read; None for as many as the encoder can.
    """

    pooling: tuple[Pooling, ...]
    normalize: bool = False
    longest: int | None = None


def _mean(states: Tensor, mask: Tensor, power: float) -> Tensor:
    return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9) ** power


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean with weights 1, 2, ... from the first token on."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=mask.dtype)
    return _mean(states, mask * positions[:, None], 1.0)


def _last_token(states: Tensor, mask: Tensor) -> Tensor:
    following = F.pad(mask[:, 1:], (0, 0, 0, 1))
    return (states * (mask - following)).sum(dim=1)


# Of hidden states [B, T, D] and a mask [B, T, 1] of their type.
POOLINGS: Mapping[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda states, mask: states[:, 0],
    "mean": lambda states, mask: _mean(states, mask, 1.0),
    "max": lambda states, mask: states.masked_fill(mask == 0, float("-inf")).amax(dim=1),
    "mean_sqrt_len_tokens": lambda states, mask: _mean(states, mask, 0.5),
    "weightedmean": _weighted_mean,
    "lasttoken": _last_token,
}
assert set(POOLINGS) == set(get_args(Pooling))


def pooled(states: Tensor, mask: Tensor, pooling: Sequence[Pooling]) -> Tensor:
    """Return embeddings ``[B, D]`` of right-padded texts, one ``D`` for each way to pool.

    Args:
        states: hidden states, ``[B, T, D]``.
        mask: 0 for padding, ``[B, T]``.
        pooling: ways to pool.
    """
    weights = mask[..., None].to(states.dtype)
    return torch.cat([POOLINGS[name](states, weights) for name in pooling], dim=1)
