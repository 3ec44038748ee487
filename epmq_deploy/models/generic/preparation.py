"""Making a model of ``transformers`` one that the rest of the library can work on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from epmq_deploy.compat import transposed_layers


def prepare(model: nn.Module) -> None:
    """Turn off what only generating text needs, and make all linear layers ``nn.Linear``.

    GPT-2 and others of its time hold the transpose of a linear layer's weight; see ``Transposed``.
    """
    if hasattr(model.config, "use_cache"):
        # What a decoder remembers of a text would go from block to block.
        model.config.use_cache = False
    for name, layer in transposed_layers(model).items():
        inputs, outputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        linear.weight.data = layer.weight.data.T
        linear.bias.data = layer.bias.data
        linear.requires_grad_(layer.weight.requires_grad)
        model.set_submodule(name, linear.train(layer.training))


def runs_in_bfloat16(run: Callable[[], Tensor], device: torch.device) -> bool:
    """Tell whether a model computes finite values where its products are bfloat16.

    Some mask attention with the smallest float32, which bfloat16 cannot hold.

    Args:
        run: runs the model on example inputs.
        device: that it is on.
    """
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            return bool(torch.isfinite(run()).all())
    except RuntimeError:
        return False
