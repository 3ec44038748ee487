"""Finding the blocks and linear layers of a model by running it once."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.compat import tensor_version
from epmq_deploy.errors import RecipeError
from epmq_deploy.models.blocks import Block, Group
from epmq_deploy.models.modules import first_input
from epmq_deploy.models.norms import pre_affine

# What tells two tensors apart: memory, layout and how often it was written to.
_Identity = tuple[int, tuple[int, ...], tuple[int, ...], int]


@dataclass
class _Trace:
    """What ran, in order; tensors are held so that no memory is used twice."""

    blocks: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=list)
    layers: list[tuple[str, Tensor]] = field(default_factory=list)
    norms: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


def find_blocks(
    model: nn.Module, run: Callable[[], Tensor], *, first_token: bool
) -> tuple[Block, ...]:
    """Find the blocks of ``model`` in the order they run, with their groups of linear layers.

    Layers belong to one group when they receive the same tensor. A norm feeds a group when that
    tensor is what it gave.

    Args:
        model: eval mode, without gradients.
        run: runs it on example inputs; the embedding ``[batch, D]``.
        first_token: whether only the first token's last hidden state reaches the embedding; groups
            of the last block that act per token are found by changing the other tokens.

    Raises:
        RecipeError: there are no repeated blocks, they do not run one after the other on hidden
            states alone, or the last one does not mix tokens; says what was found.
    """
    root, names = _block_list(model)
    trace = _traced(model, names, run)
    _check_sequence(root, names, trace)
    blocks = []
    for name, _, _, output in trace.blocks:
        groups = _groups(name, trace)
        if name == names[-1] and first_token:
            groups = [_with_pooled(model, group, run) for group in groups]
            if all(group.pooled for group in groups):
                raise RecipeError(
                    f"{name} does not let one token see another, at least not on this device"
                )
        blocks.append(Block(name, tuple(groups), norm=_last_norm(name, trace, output)))
    return tuple(blocks)


def _block_list(model: nn.Module) -> tuple[str, list[str]]:
    """Return the module list whose items, all of one kind, hold most of the linear weights."""
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        sizes = [_linear_weights(item) for item in module]
        if len({type(item) for item in module}) == 1 and all(sizes):
            weights[name] = sum(sizes)
    if not weights:
        raise RecipeError(
            f"{type(model).__name__} has no repeated blocks: no list of two or more modules of one "
            "kind with linear layers"
        )
    root = max(weights, key=lambda name: weights[name])
    count = len(model.get_submodule(root))  # type: ignore[arg-type]
    return root, [f"{root}.{index}" for index in range(count)]


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _traced(model: nn.Module, names: list[str], run: Callable[[], Tensor]) -> _Trace:
    trace, handles = _Trace(), []
    for block in names:
        for inner, module in model.get_submodule(block).named_modules():
            name = f"{block}.{inner}" if inner else block
            if not inner:
                hook = module.register_forward_hook(_watch_block(name, trace), with_kwargs=True)
            elif isinstance(module, nn.Linear):
                hook = module.register_forward_hook(_watch_layer(name, trace), with_kwargs=True)
            elif _is_norm(module):
                hook = module.register_forward_hook(_watch_norm(name, trace), with_kwargs=True)
            else:
                continue
            handles.append(hook)
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        trace.norms = [
            (name, entered, left)
            for name, entered, left in trace.norms
            if _is_affine(model.get_submodule(name), entered, left)
        ]
    return trace


def _watch_block(name: str, trace: _Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        left = output[0] if isinstance(output, tuple) else output
        trace.blocks.append((name, args, kwargs, left))

    return hook


def _watch_layer(name: str, trace: _Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        trace.layers.append((name, first_input(args, kwargs)))

    return hook


def _watch_norm(name: str, trace: _Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        trace.norms.append((name, first_input(args, kwargs), output))

    return hook


def _is_affine(norm: nn.Module, entered: Tensor, left: Tensor) -> bool:
    """Whether a norm uses its weight as a gain; some use 1 + weight, and cannot be re-fitted."""
    plain = pre_affine(norm, entered) * norm.get_parameter("weight")
    bias = dict(norm.named_parameters()).get("bias")
    return torch.allclose(plain if bias is None else plain + bias, left, atol=1e-5)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or RMSNorm: a gain per channel, maybe a bias, nothing else."""
    parameters = dict(module.named_parameters())
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    named = "weight" in parameters and set(parameters) <= {"weight", "bias"}
    kind = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("Norm", "LayerNorm"))
    return named and kind and len(shapes) == 1 and len(next(iter(shapes))) == 1


def _check_sequence(root: str, names: list[str], trace: _Trace) -> None:
    ran = [name for name, *_ in trace.blocks]
    if ran != names:
        raise RecipeError(f"the blocks of {root} do not run once each, in order, but as {ran}")
    twice = sorted(name for name, count in Counter(n for n, _ in trace.layers).items() if count > 1)
    if twice:
        raise RecipeError(
            f"{', '.join(twice)} runs more than once on one batch, so there is no one input to "
            "calibrate it on"
        )
    hidden: Tensor | None = None
    _, first_args, first_kwargs, _ = trace.blocks[0]
    for name, args, kwargs, output in trace.blocks:
        entered, args, kwargs = _split(args, kwargs)
        if hidden is not None and entered is not hidden:
            raise RecipeError(f"{name} does not receive what the block before it gave")
        _, wanted_args, wanted_kwargs = _split(first_args, first_kwargs)
        if not _alike((args, kwargs), (wanted_args, wanted_kwargs)):
            raise RecipeError(
                f"{name} receives other arguments besides hidden states than {names[0]} does"
            )
        hidden = output


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split a block's arguments into hidden states and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states", None), (), rest


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def _identity(tensor: Tensor) -> _Identity:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor_version(tensor)


def _groups(block: str, trace: _Trace) -> list[Group]:
    shared: dict[_Identity, list[str]] = {}
    for name, entered in trace.layers:
        if name.startswith(f"{block}."):
            shared.setdefault(_identity(entered), []).append(name)
    norms = {_identity(left): name for name, _, left in trace.norms if name.startswith(f"{block}.")}
    return [Group(tuple(names), norms.get(key)) for key, names in shared.items()]


def _last_norm(block: str, trace: _Trace, output: Tensor) -> str | None:
    """Return the norm that computes the block's output, None where there is none."""
    for name, _, left in trace.norms:
        if name.startswith(f"{block}.") and _identity(left) == _identity(output):
            return name
    return None


def _with_pooled(model: nn.Module, group: Group, run: Callable[[], Tensor]) -> Group:
    """Return the group, pooled where only its output for the first token reaches the embedding."""

    def disturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[:, 1:] += 1.0
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
    return Group(group.layers, group.norm, bool(torch.equal(before, after)))
