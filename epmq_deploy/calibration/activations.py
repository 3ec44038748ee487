"""Running the deployed model block by block over calibration samples."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.statistics import Accumulator, TaskStatistics
from epmq_deploy.errors import NumericsError


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
    accumulator = Accumulator()
    for item in inputs:
        accumulator.add(input_of(block, layer, item))
    return accumulator.statistics()


def paired_statistics(
    block: nn.Module,
    layer: nn.Module,
    inputs: Sequence[BlockInput],
    expert_block: nn.Module,
    expert_layers: Mapping[str, nn.Linear],
    expert_inputs: Sequence[BlockInput],
) -> TaskStatistics:
    """As ``input_statistics``, with the expert's outputs on the same batches.

    Args:
        block: the student's block.
        layer: the student's layer (the first of those that share an input).
        inputs: what the student's block receives, batch by batch.
        expert_block: the expert's block.
        expert_layers: the expert's layers of the group, by name.
        expert_inputs: what the expert's block receives, batch by batch.
    """
    accumulator = Accumulator()
    for item, expert_item in zip(inputs, expert_inputs, strict=True):
        features = input_of(expert_block, next(iter(expert_layers.values())), expert_item)
        outputs = {name: features @ linear.weight.T for name, linear in expert_layers.items()}
        accumulator.add(input_of(block, layer, item), outputs)
    return accumulator.statistics()


def input_of(block: nn.Module, inner: nn.Module, item: BlockInput) -> Tensor:
    """What a module inside ``block`` receives for one batch; the block stops there."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = inner.register_forward_pre_hook(keep)
    try:
        with torch.inference_mode(), contextlib.suppress(_Reached):
            item.run(block)
    finally:
        handle.remove()
    if not seen:
        raise NumericsError("a module listed by the model family does not run in its block")
    return seen[0]


def advance(block: nn.Module, inputs: Sequence[BlockInput]) -> None:
    """Replace each batch's hidden states by the block's output."""
    with torch.inference_mode():
        for item in inputs:
            item.hidden = item.run(block)
