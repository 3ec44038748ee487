"""Activation checkpointing: blocks run again in the backward pass instead of being remembered."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from epmq_deploy.models import Block


@contextmanager
def checkpointed(model: nn.Module, blocks: tuple[Block, ...]) -> Iterator[None]:
    """Have each block keep nothing but its inputs for the backward pass, until the end.

    Blocks must be deterministic, as all are in eval mode.
    """
    modules = [model.get_submodule(block.name) for block in blocks]
    for module in modules:
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]
