"""Picking the torch device."""

from __future__ import annotations

from typing import Literal

from epmq_deploy.errors import RecipeError
from epmq_deploy.lazy import torch

DeviceName = Literal["auto", "cpu", "cuda"]


def pick_device(name: DeviceName) -> torch.device:
    """``auto`` takes CUDA when there is one.

    Raises:
        RecipeError: CUDA was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError("device cuda: no CUDA device is available to torch; use auto or cpu")
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(name)
