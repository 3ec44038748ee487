"""Which layers a correction for every sample's task can be added to."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from epmq_deploy.models.modules import first_input, linear_layer


def uncorrectable(
    model: nn.Module, names: Collection[str], run: Callable[[], object], batch: int
) -> dict[str, str]:
    """Return the layers that cannot be corrected sample by sample, with the reason.

    Args:
        model: the model.
        names: dotted names of linear layers.
        run: runs the model on a batch of samples.
        batch: how many; a number that no other size of the model divides by chance.
    """
    received: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received[name].append(tuple(first_input(args, kwargs).shape))

        return hook

    handles = [
        linear_layer(model, name).register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.inference_mode():
            run()
    finally:
        for handle in handles:
            handle.remove()
    reasons = {name: _reason(shapes, batch) for name, shapes in received.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _reason(shapes: list[tuple[int, ...]], batch: int) -> str:
    """Return why a layer that receives inputs of these shapes cannot be corrected, else nothing."""
    if not shapes:
        return "it does not run"
    if len(shapes) > 1:
        return f"it runs {len(shapes)} times"
    if shapes[0][0] != batch or len(shapes[0]) < 2:
        return "its input does not hold one sample after the other"
    return ""
