"""LayerNorm and RMSNorm, taken apart."""

import torch
from torch import Tensor, nn


def pre_affine(norm: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a LayerNorm or RMSNorm multiplies with its gain, ``[..., K]``.

    Args:
        norm: with a ``weight [K]`` and maybe a ``bias [K]``; left unmodified.
        inputs: ``[..., K]``.
    """
    plain = {name: torch.zeros_like(value) for name, value in norm.named_parameters()}
    plain["weight"] = torch.ones_like(plain["weight"])
    output: Tensor = torch.func.functional_call(norm, plain, (inputs,))
    return output
