"""Running the deployed model block by block over calibration samples."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.statistics import InputAccumulator, TaskStatistics


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook once what it was waiting for has been seen."""


@dataclass
class BlockInput:
    """What a block was called with for one batch: hidden states first, the rest unchanged."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """The block's hidden states for this batch."""
        output = block(self.hidden, *self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


def capture_block_inputs(
    block: nn.Module,
    run_model: Callable[[tuple[Tensor, ...]], object],
    batches: Iterable[tuple[Tensor, ...]],
) -> list[BlockInput]:
    """What the first block receives for each batch; the model stops there."""
    captured: list[BlockInput] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            captured.append(BlockInput(args[0], args[1:], kwargs))
        else:
            rest = dict(kwargs)
            captured.append(BlockInput(rest.pop("hidden_states"), (), rest))
        raise _Reached

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            for batch in batches:
                try:
                    run_model(batch)
                except _Reached:
                    continue
    finally:
        handle.remove()
    return captured


def input_statistics(
    block: nn.Module, layer: nn.Module, inputs: Sequence[BlockInput]
) -> TaskStatistics:
    """Statistics of ``layer``'s inputs while ``block`` runs; stops as soon as it is reached."""
    accumulator = InputAccumulator()

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        accumulator.add(args[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(collect)
    try:
        with torch.inference_mode():
            for item in inputs:
                try:
                    item.run(block)
                except _Reached:
                    continue
    finally:
        handle.remove()
    return accumulator.statistics()


def advance(block: nn.Module, inputs: Sequence[BlockInput]) -> None:
    """Replace each batch's hidden states by the block's output."""
    with torch.inference_mode():
        for item in inputs:
            item.hidden = item.run(block)
