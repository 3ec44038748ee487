"""Running one block over calibration batches, stopping and resuming between its layers.

Layers of a block are quantized in the order they run, and each one receives the outputs of the
quantized layers before it. Instead of running the block from its start for every layer, a batch
remembers the outputs of layers that will not change any more: each linear layer runs once a batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.cache import ActivationCache, CachedTensor
from epmq_deploy.compat import map_instances
from epmq_deploy.errors import NumericsError
from epmq_deploy.models.modules import first_input
from epmq_deploy.models.norms import pre_affine

# See ``Block.passes_on``.
PassedOn = tuple[tuple[int, int], ...]


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook to stop the model once the hook has run."""


@dataclass
class BlockBatch:
    """One batch on its way through the blocks of one model.

    Attributes:
        hidden: hidden states the current block receives.
        args: its other positional arguments; floating-point tensors in them are ``CachedTensor``.
        kwargs: its keyword arguments; floating-point tensors in them are ``CachedTensor``.
        products: dtype in which blocks multiply matrices, float32 or bfloat16; hidden states,
            norms and softmax are float32 in either case.
        remembered: outputs of layers of the current block that will not change any more.
    """

    hidden: CachedTensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    products: torch.dtype = torch.float32
    remembered: dict[str, CachedTensor] = field(default_factory=dict)

    def run(self, block: nn.Module) -> tuple[Any, ...]:
        """Return the block's outputs for this batch, hidden states first."""
        hidden = self.hidden.value()
        args, kwargs = map_instances(CachedTensor, CachedTensor.peek, (self.args, self.kwargs))
        low = self.products == torch.bfloat16
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=low):
            output = block(hidden, *args, **kwargs)
        return output if isinstance(output, tuple) else (output,)

    def take(self, outputs: tuple[Any, ...], passed_on: PassedOn, cache: ActivationCache) -> None:
        """Pass outputs of a block on to the next ones, where those receive nothing yet."""
        args = list(self.args)
        for output, position in passed_on:
            if args[position] is None:
                args[position] = cache.keep(outputs[output])
        self.args = tuple(args)


def capture_block_batch(
    block: nn.Module,
    run_model: Callable[[], object],
    cache: ActivationCache,
    dtype: torch.dtype | None = None,
    products: torch.dtype = torch.float32,
) -> BlockBatch:
    """Run the model up to its first block and return what that receives.

    Args:
        block: the first block.
        run_model: runs the model on one batch.
        cache: keeps the hidden states.
        dtype: to keep them in; default: their own.
        products: dtype in which blocks will multiply matrices.

    Raises:
        NumericsError: the block does not run.
    """
    captured: list[BlockBatch] = []

    def cached_if_floating(tensor: Tensor) -> Tensor | CachedTensor:
        return cache.keep(tensor) if tensor.is_floating_point() else tensor

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        positional, named = map_instances(Tensor, cached_if_floating, (args[1:], rest))
        captured.append(BlockBatch(cache.keep(hidden, dtype), positional, named, products))
        raise _Reached

    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.inference_mode(), contextlib.suppress(_Reached):
            run_model()
    finally:
        handle.remove()
    if not captured:
        raise NumericsError("the first block listed by the model family does not run")
    return captured[0]


def input_of(
    block: nn.Module,
    inner: nn.Module,
    batch: BlockBatch,
    done: Mapping[str, nn.Module],
    cache: ActivationCache,
) -> Tensor:
    """Run a block up to a module inside it and return what that receives for one batch.

    Args:
        block: the block to run.
        inner: the module.
        batch: on its way through the block.
        done: layers whose outputs will not change any more; they are remembered.
        cache: keeps those outputs.

    Raises:
        NumericsError: the module does not run in the block.
    """
    received: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(first_input(args, kwargs))
        raise _Reached

    handle = inner.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        remembering = _remembering(batch, done, cache)
        with torch.inference_mode(), remembering, contextlib.suppress(_Reached):
            batch.run(block)
    finally:
        handle.remove()
    if not received:
        raise NumericsError("a module listed by the model family does not run in its block")
    return received[0]


def advance(
    block: nn.Module,
    batch: BlockBatch,
    cache: ActivationCache,
    *,
    dtype: torch.dtype | None = None,
    done: Mapping[str, nn.Module] | None = None,
    passed_on: PassedOn = (),
) -> None:
    """Take a batch to the next block and forget the outputs remembered in this one.

    Args:
        block: the block to run, all of whose layers are done.
        batch: its hidden states are replaced by the block's output.
        cache: keeps them.
        dtype: to keep them in; default: their own.
        done: layers whose remembered outputs may be used.
        passed_on: see ``Block.passes_on``.
    """
    with torch.inference_mode(), _remembering(batch, done or {}, None):
        outputs = batch.run(block)
    batch.remembered.clear()
    batch.hidden = cache.keep(outputs[0], dtype, owned=True)
    batch.take(outputs, passed_on, cache)


def record(
    block: nn.Module,
    batch: BlockBatch,
    layers: Mapping[str, nn.Linear],
    norms: Mapping[str, nn.Module],
    cache: ActivationCache,
    dtype: torch.dtype | None = None,
    layer_dtype: torch.dtype | None = None,
    passed_on: PassedOn = (),
) -> dict[str, CachedTensor]:
    """Take a batch through an expert's block and keep what its layers and norms give.

    Args:
        block: the expert's block.
        batch: on its way through the expert.
        layers: linear layers by name; their outputs without bias ``[..., N]`` are kept.
        norms: norms by name; their outputs before gain and bias ``[..., K]`` are kept.
        cache: keeps them.
        dtype: to keep hidden states and norms' outputs in; default: their own.
        layer_dtype: to keep layers' outputs in; default: ``dtype``.
        passed_on: see ``Block.passes_on``.

    Returns:
        Outputs by layer and norm.
    """
    outputs: dict[str, CachedTensor] = {}
    norm_inputs: dict[str, Tensor] = {}

    def keep_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.bias is None:
                outputs[name] = cache.keep(output, layer_dtype or dtype)
            else:
                unbiased = output - module.bias
                outputs[name] = cache.keep(unbiased, layer_dtype or dtype, owned=True)

        return hook

    def hold_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            norm_inputs[name] = args[0]

        return hook

    handles = [layer.register_forward_hook(keep_output(name)) for name, layer in layers.items()]
    handles += [norm.register_forward_pre_hook(hold_input(name)) for name, norm in norms.items()]
    try:
        advance(block, batch, cache, dtype=dtype, passed_on=passed_on)
    finally:
        for handle in handles:
            handle.remove()
    with torch.inference_mode():
        for name, inputs in norm_inputs.items():
            outputs[name] = cache.keep(pre_affine(norms[name], inputs), dtype, owned=True)
    return outputs


@contextlib.contextmanager
def _remembering(
    batch: BlockBatch, done: Mapping[str, nn.Module], cache: ActivationCache | None
) -> Iterator[None]:
    """Let layers that are done return remembered outputs, and remember those they compute."""
    handles = []
    patched = []

    def remembered(output: CachedTensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: output.value()

    def remember(name: str, cache: ActivationCache) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            batch.remembered[name] = cache.keep(output)

        return hook

    try:
        for name, layer in done.items():
            if name in batch.remembered:
                # An attribute of the instance hides the method of the class.
                layer.forward = remembered(batch.remembered[name])
                patched.append(layer)
            elif cache is not None:
                handles.append(layer.register_forward_hook(remember(name, cache)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in patched:
            del layer.forward
