"""Finding the blocks and linear layers of a model by running it once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import EVERY_TOKEN, Block, Group
from epmq_deploy.models.generic.trace import BlockRun, Identity, identity, traced


def find_blocks(
    model: nn.Module, run: Callable[[], Tensor], *, read: Tensor | None
) -> tuple[Block, ...]:
    """Find the blocks of ``model`` in the order they run, with their groups of linear layers.

    Layers belong to one group when they receive the same tensors. A norm feeds a group when that
    tensor is what it gave.

    Args:
        model: eval mode, without gradients.
        run: runs it on example inputs; the embedding ``[batch, D]``.
        read: the token whose last hidden state alone reaches the embedding, int64 ``[batch]``;
            groups of the last block that act per token are found by changing the other tokens.
            None where all tokens may reach it.

    Raises:
        RecipeError: there are no repeated blocks, they do not run in order, or the last one does
            not mix tokens; says what was found.
    """
    root, names = _block_list(model)
    runs = _in_order(root, names, traced(model, names, run))
    independent = _independent_arguments(model, names, run, runs)
    blocks: list[Block] = []
    for name in names:
        first, *_ = repeated = runs[name]
        groups = _groups(first)
        if name == names[-1] and read is not None and len(repeated) == 1:
            groups = [_with_pooled(model, group, run, read) for group in groups]
            if all(group.pooled for group in groups):
                raise RecipeError(
                    f"{name} does not let one token see another, at least not on this device"
                )
        block = Block(name, tuple(groups), norm=_last_norm(first), repeats=len(repeated))
        blocks.append(_linked(block, blocks, runs, independent))
    return tuple(blocks)


def _block_list(model: nn.Module) -> tuple[str, list[str]]:
    """Return the module list whose items, all of one kind, hold most of the linear weights."""
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        sizes = [_linear_weights(item) for item in module]
        if len({type(item) for item in module}) == 1 and all(sizes):
            weights[name] = sum(sizes)
    if not weights:
        only = ", only convolutions" if any(map(_is_convolution, model.modules())) else ""
        raise RecipeError(
            f"{type(model).__name__} has no blocks with linear layers{only}; those are what is "
            "quantized"
        )
    root = max(weights, key=lambda name: weights[name])
    count = len(model.get_submodule(root))  # type: ignore[arg-type]
    return root, [f"{root}.{index}" for index in range(count)]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _in_order(
    root: str, names: list[str], runs: Sequence[BlockRun]
) -> dict[str, tuple[BlockRun, ...]]:
    """Return the runs of each block, which follow each other."""
    ran = [(name, tuple(group)) for name, group in groupby(runs, key=lambda run: run.name)]
    if [name for name, _ in ran] != names:
        shown = [run.name for run in runs]
        raise RecipeError(f"the blocks of {root} do not run one after the other, but as {shown}")
    for run in runs:
        if run.hidden is None:
            raise RecipeError(f"{run.name} receives no hidden states as its first argument")
    return dict(ran)


def _independent_arguments(
    model: nn.Module,
    names: list[str],
    run: Callable[[], Tensor],
    runs: Mapping[str, Sequence[BlockRun]],
) -> frozenset[str]:
    """Return the blocks whose arguments stay what they are when hidden states change."""

    def disturb(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_disturbed(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": _disturbed(kwargs["hidden_states"])}

    first = model.get_submodule(names[0])
    handle = first.register_forward_pre_hook(disturb, with_kwargs=True)
    try:
        disturbed = traced(model, names, run)
    finally:
        handle.remove()
    given = [one for name in names for one in runs[name]]
    return frozenset(
        before.name
        for before, after in zip(given, disturbed, strict=True)
        if _same_arguments(before, after)
    )


def _disturbed(hidden: Tensor) -> Tensor:
    # Not by a constant, which norms would take away again.
    noise = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(0))
    return hidden + noise.to(hidden)


def _linked(
    block: Block,
    earlier: Sequence[Block],
    runs: Mapping[str, Sequence[BlockRun]],
    independent: frozenset[str],
) -> Block:
    """Return a block with its stream and arguments.

    It goes on with the stream of the block before where it receives that one's hidden states, and
    arguments that are known before the stream begins.
    """
    if not earlier:
        return block
    before = earlier[-1]
    received, given = runs[block.name][0], runs[before.name][-1].left
    follows = received.hidden is given and block.repeats == before.repeats == 1
    if not follows or block.name not in independent:
        return replace(block, stream=block.name)
    stream = [other for other in earlier if other.stream == before.stream]
    for other in stream:
        if _same_arguments(received, runs[other.name][0]):
            arguments = None if other is stream[0] else other.name
            return replace(block, stream=before.stream, arguments=arguments)
    return replace(block, stream=before.stream, arguments=block.name)


def _same_arguments(one: BlockRun, other: BlockRun) -> bool:
    return _alike((one.args, one.kwargs), (other.args, other.kwargs))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def _groups(run: BlockRun) -> list[Group]:
    """Return the layers of a block by what they receive, in the order they first run."""
    received: dict[str, list[Tensor]] = {}
    for name, entered in run.layers:
        received.setdefault(name, []).append(entered)
    shared: dict[tuple[Identity, ...], list[str]] = {}
    for name, tensors in received.items():
        shared.setdefault(tuple(map(identity, tensors)), []).append(name)
    norms = {identity(left): name for name, _, left in run.norms}
    groups = []
    for inputs, names in shared.items():
        # What a norm feeds is one thing, so that it is re-fitted once.
        norm = norms.pop(inputs[0], None)
        groups.append(
            Group(tuple(names), norm, stream=_stream(received[names[0]][0], run), runs=len(inputs))
        )
    return groups


def _stream(entered: Tensor, run: BlockRun) -> str | None:
    """Return the stream of a layer's input: its block's where it has a row per token."""
    assert run.hidden is not None, "checked when the order was"
    return None if entered.shape[:2] == run.hidden.shape[:2] else EVERY_TOKEN


def _last_norm(run: BlockRun) -> str | None:
    """Return the norm that computes the block's output, None where there is none."""
    for name, _, left in run.norms:
        if identity(left) == identity(run.left):
            return name
    return None


def _with_pooled(model: nn.Module, group: Group, run: Callable[[], Tensor], read: Tensor) -> Group:
    """Return the group, pooled where only its output for the token read reaches the embedding."""
    if group.stream == EVERY_TOKEN or group.runs > 1:
        return group
    rows = torch.arange(len(read), device=read.device)

    def disturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0] + 1.0
        changed[rows, read] = args[0][rows, read]
        return (changed, *args[1:])

    with torch.no_grad():
        before = run()
        handles = [
            model.get_submodule(name).register_forward_pre_hook(disturb) for name in group.layers
        ]
        try:
            after = run()
        finally:
            for handle in handles:
                handle.remove()
    return replace(group, pooled=bool(torch.equal(before, after)))
