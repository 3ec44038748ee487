"""How many weights a model has, from the headers of its files."""

import re
from dataclasses import dataclass

import torch

from epmq_deploy.checkpoints.checkpoint import Checkpoint
from epmq_deploy.models.base import ModelFamily

_IN_A_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights.

    Attributes:
        deployed: in the part that is exported.
        in_blocks: of these, in matrices of the blocks, which are quantized.
    """

    deployed: int
    in_blocks: int


def weight_counts(checkpoint: Checkpoint, family: ModelFamily) -> WeightCounts:
    """Count the weights of a checkpoint without reading them."""
    deployed = in_blocks = 0
    for name, info in checkpoint.tensors.items():
        if not family.is_deployed(name):
            continue
        count = torch.Size(info.shape).numel()
        deployed += count
        if len(info.shape) > 1 and _IN_A_BLOCK.search(name):
            in_blocks += count
    return WeightCounts(deployed, in_blocks)
