"""Corrections of a batch whose samples belong to different tasks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from epmq_deploy.models.modules import first_input, linear_layer
from epmq_deploy.quantization.residuals.factors import LayerResiduals, ModelResiduals


@dataclass
class BatchTasks:
    """Which tasks the samples of the batch that runs now belong to.

    Attributes:
        numbers: of each sample's task, int64 ``[batch]``; None between batches.
    """

    numbers: Tensor | None = None


def correction(x: Tensor, tasks: Tensor, residuals: LayerResiduals) -> Tensor:
    """Return what is added to a layer's output: of each sample, its task's ``D x + b``.

    Args:
        x: the layer's inputs, float32 ``[batch, ..., K]``.
        tasks: number of each sample's task, int64 ``[batch]``.
        residuals: of the layer.

    Returns:
        float32 ``[batch, ..., N]``.
    """
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    right = residuals.right.to(x.dtype) * residuals.scales[:, :, None].to(x.dtype)
    middle = rows @ right[tasks].transpose(1, 2)
    output = middle @ residuals.left[tasks].to(x.dtype).transpose(1, 2)
    if residuals.bias is not None and residuals.bias_scale is not None:
        output = output + (residuals.bias[tasks].to(x.dtype) * residuals.bias_scale)[:, None]
    return output.reshape(*x.shape[:-1], -1)


@contextmanager
def corrected(model: nn.Module, residuals: ModelResiduals, tasks: BatchTasks) -> Iterator[None]:
    """Have a model's layers add the corrections of each sample's task.

    Args:
        model: whose layers compute without corrections.
        residuals: of its layers.
        tasks: of the batch that runs.
    """

    def hook_of(layer: LayerResiduals) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            assert tasks.numbers is not None, "a batch runs"
            return output + correction(first_input(args, kwargs), tasks.numbers, layer)

        return hook

    handles = [
        linear_layer(model, name).register_forward_hook(hook_of(layer), with_kwargs=True)
        for name, layer in residuals.layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
