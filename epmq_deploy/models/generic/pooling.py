"""How classifiers make one embedding per sample of the encoder's hidden states."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["first", "mean", "patches", "first_and_patches", "last", "every"]


def last_token(weights: Tensor) -> Tensor:
    """Return the position of the last token with a weight above 0, int64 ``[B]``; 0 without any.

    Args:
        weights: of tokens, ``[B, T]``.
    """
    positions = torch.arange(weights.shape[1], device=weights.device)
    # Not argmax, which onnxruntime does not compute on 64-bit integers everywhere.
    return (positions * (weights > 0)).amax(dim=1)


def _take_last(hidden: Tensor, weights: Tensor) -> Tensor:
    position = last_token(weights)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, position).squeeze(1)


def _with_shares(hidden: Tensor, weights: Tensor) -> Tensor:
    shares = weights / weights.sum(1, keepdim=True)
    return torch.cat([hidden, shares[..., None]], dim=2)


# Hidden states [B, T, D] and weights of tokens [B, T] to what heads take; see ``TaskHead``.
POOLINGS: Mapping[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    "first": lambda hidden, mask: hidden[:, 0],
    "mean": lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "patches": lambda hidden, mask: hidden[:, 1:].mean(dim=1),
    "first_and_patches": lambda hidden, mask: torch.cat(
        [hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1
    ),
    "last": _take_last,
    "every": _with_shares,
}


def as_tokens(hidden: Tensor) -> Tensor:
    """Return hidden states as ``[B, T, D]``: the positions of a feature map are its tokens.

    Args:
        hidden: ``[B, T, D]``, or a feature map ``[B, D, H, W]``.
    """
    return hidden if hidden.dim() == 3 else hidden.flatten(2).transpose(1, 2)


def real_tokens(ids: Tensor, mask: Tensor, padding: int | None) -> Tensor:
    """Return which tokens of a batch a classifier may read as the last one, bool ``[B, T]``.

    As ``transformers`` does, a token counts as padding by its id, whatever the mask says.

    Args:
        ids: ``[B, T]``.
        mask: ``[B, T]``.
        padding: id of the padding token, where the model's config names one.
    """
    return mask.bool() if padding is None else mask.bool() & (ids != padding)
