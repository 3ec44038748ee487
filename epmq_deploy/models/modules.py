"""Small helpers for torch modules and their forward hooks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor a module was called with, by position or by name."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def linear_layer(module: nn.Module, name: str) -> nn.Linear:
    """Return a linear layer by dotted name.

    Raises:
        TypeError: it is a module of another kind.
    """
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a linear layer")
    return layer


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a module's bias, None where it has none."""
    return dict(module.named_parameters(recurse=False)).get("bias")
