"""Running a model once and noting which blocks, linear layers and norms run on what."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.compat import tensor_version
from epmq_deploy.models.modules import first_input
from epmq_deploy.models.norms import pre_affine

# What tells two tensors apart: memory, layout and how often it was written to.
Identity = tuple[int, tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True)
class BlockRun:
    """One run of a block.

    Attributes:
        name: dotted name.
        hidden: hidden states it received; None where it received none.
        args: its other positional arguments.
        kwargs: its other keyword arguments.
        left: the hidden states it gave.
        layers: linear layers that ran in it, with what they received, in order.
        norms: norms that ran in it, with what they received and gave, in order.
    """

    name: str
    hidden: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    left: Tensor
    layers: tuple[tuple[str, Tensor], ...]
    norms: tuple[tuple[str, Tensor, Tensor], ...]


@dataclass
class _Notes:
    """What ran since the last block ended; tensors are held so that no memory is used twice."""

    runs: list[BlockRun] = field(default_factory=list)
    layers: list[tuple[str, Tensor]] = field(default_factory=list)
    norms: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)


def traced(model: nn.Module, names: list[str], run: Callable[[], Tensor]) -> list[BlockRun]:
    """Run a model and return every run of its blocks, in order.

    Args:
        model: eval mode, without gradients.
        names: dotted names of its blocks.
        run: runs it.
    """
    notes, handles = _Notes(), []
    for block in names:
        for inner, module in model.get_submodule(block).named_modules():
            name = f"{block}.{inner}" if inner else block
            if not inner:
                hook = module.register_forward_hook(_watch_block(name, notes), with_kwargs=True)
            elif isinstance(module, nn.Linear):
                hook = module.register_forward_hook(_watch_layer(name, notes), with_kwargs=True)
            elif _is_norm(module):
                hook = module.register_forward_hook(_watch_norm(name, notes), with_kwargs=True)
            else:
                continue
            handles.append(hook)
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    # Only now, since norms run once more here.
    with torch.no_grad():
        return [_with_affine_norms(model, block_run) for block_run in notes.runs]


def _with_affine_norms(model: nn.Module, run: BlockRun) -> BlockRun:
    norms = (norm for norm in run.norms if _is_affine(model.get_submodule(norm[0]), *norm[1:]))
    return replace(run, norms=tuple(norms))


def identity(tensor: Tensor) -> Identity:
    """Return what tells this tensor from all others that are held."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor_version(tensor)


def _watch_block(name: str, notes: _Notes) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        left = output[0] if isinstance(output, tuple | list) else output
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states", None)
        inside = tuple(notes.layers), tuple(notes.norms)
        notes.runs.append(BlockRun(name, hidden, args[1:], rest, left, *inside))
        notes.layers, notes.norms = [], []

    return hook


def _watch_layer(name: str, notes: _Notes) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        notes.layers.append((name, first_input(args, kwargs)))

    return hook


def _watch_norm(name: str, notes: _Notes) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        notes.norms.append((name, first_input(args, kwargs), output))

    return hook


def _is_affine(norm: nn.Module, entered: Tensor, left: Tensor) -> bool:
    """Whether a norm uses its weight as a gain; some use 1 + weight, and cannot be re-fitted."""
    weight = norm.get_parameter("weight")
    if entered.shape[-1:] != weight.shape:
        # Its channels are not the last dimension.
        return False
    plain = pre_affine(norm, entered) * weight
    bias = dict(norm.named_parameters()).get("bias")
    return torch.allclose(plain if bias is None else plain + bias, left, atol=1e-5)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or RMSNorm: a gain per channel, maybe a bias, nothing else."""
    parameters = dict(module.named_parameters())
    shapes = {tuple(parameter.shape) for parameter in parameters.values()}
    named = "weight" in parameters and set(parameters) <= {"weight", "bias"}
    kind = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("Norm", "LayerNorm"))
    return named and kind and len(shapes) == 1 and len(next(iter(shapes))) == 1
