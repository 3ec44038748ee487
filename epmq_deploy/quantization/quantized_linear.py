"""What quantizing one linear layer yields: integer codes and the grid they live on."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from epmq_deploy.quantization.solver.grid import expand_groups


@dataclass(frozen=True)
class QuantizedLinear:
    """Codes and grid of one linear layer; ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: uint8 ``[N, K]`` (out, in), each below ``2**bits``; unpacked, original column order.
        scales: float32 ``[N, G]`` with ``G = ceil(K / group_size)``; column ``k`` belongs to
            group ``k // group_size``.
        zero_points: uint8 ``[N, G]``.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; ``K`` when quantized per channel.
        symmetric: whether every zero point is ``2**(bits - 1)``.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def out_features(self) -> int:
        """``N``."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """``K``."""
        return self.codes.shape[1]

    def codes_sha256(self) -> str:
        """sha256 of the codes: one byte each, row by row, whatever they are packed to in a file."""
        return hashlib.sha256(self.codes.cpu().contiguous().numpy().tobytes()).hexdigest()

    def dequantize(self) -> Tensor:
        """The weight the codes stand for, float32 ``[N, K]``."""
        weight = self.codes.to(torch.float32)
        # In place: a model's largest layer would otherwise be in memory five times.
        weight -= expand_groups(self.zero_points, self.group_size, self.in_features)
        weight *= expand_groups(self.scales, self.group_size, self.in_features)
        return weight
