"""Running one block over calibration batches, stopping and resuming between its layers.

Layers of a block are quantized in the order they run, and each one receives the outputs of the
quantized layers before it. Instead of running the block from its start for every layer, a batch
remembers the outputs of layers that will not change any more: each linear layer runs once a batch.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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


# Arguments of a block besides hidden states, positional and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
        remembered: outputs of layers of the current block that will not change any more, one for
            each run.
        arguments: of blocks that receive others than the stream's first block, by their names, and
            that one's own under ``""``; empty where all blocks receive the same.
    """

    hidden: CachedTensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    products: torch.dtype = torch.float32
    remembered: dict[str, list[CachedTensor]] = field(default_factory=dict)
    arguments: dict[str, Arguments] = field(default_factory=dict)

    def run(self, block: nn.Module) -> tuple[Any, ...]:
        """Return the block's outputs for this batch, hidden states first."""
        hidden = self.hidden.value()
        args, kwargs = map_instances(CachedTensor, CachedTensor.peek, (self.args, self.kwargs))
        low = self.products == torch.bfloat16
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=low):
            output = block(hidden, *args, **kwargs)
        return tuple(output) if isinstance(output, tuple | list) else (output,)

    def take(self, outputs: tuple[Any, ...], passed_on: PassedOn, cache: ActivationCache) -> None:
        """Pass outputs of a block on to the next ones, where those receive nothing yet."""
        args = list(self.args)
        for output, position in passed_on:
            if args[position] is None:
                args[position] = cache.keep(outputs[output])
        self.args = tuple(args)


def capture_block_batches(
    block: nn.Module,
    run_model: Callable[[], object],
    cache: ActivationCache,
    dtype: torch.dtype | None = None,
    products: torch.dtype = torch.float32,
    repeats: int = 1,
) -> list[BlockBatch]:
    """Run the model up to a block and return what that receives, each time it runs.

    Args:
        block: the block.
        run_model: runs the model on one batch.
        cache: keeps the hidden states.
        dtype: to keep them in; default: their own.
        products: dtype in which blocks will multiply matrices.
        repeats: how often the block runs.

    Raises:
        NumericsError: the block does not run so often.
    """
    captured: list[BlockBatch] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        positional, named = _cached_arguments(args, kwargs, cache)
        captured.append(BlockBatch(cache.keep(hidden, dtype), positional, named, products))
        if len(captured) == repeats:
            raise _Reached

    _run_with_hooks([(block, capture)], run_model)
    if len(captured) != repeats:
        raise NumericsError(
            f"a block listed by the model family runs {len(captured)} times, not {repeats}"
        )
    return captured


def capture_arguments(
    blocks: Mapping[str, nn.Module], run_model: Callable[[], object], cache: ActivationCache
) -> dict[str, Arguments]:
    """Run the model and return what blocks receive besides hidden states, by name.

    Args:
        blocks: by name, in the order they run.
        run_model: runs the model on one batch.
        cache: keeps floating-point tensors.

    Raises:
        NumericsError: a block does not run.
    """
    captured: dict[str, Arguments] = {}

    def capture_of(name: str) -> Callable[..., None]:
        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[name] = _cached_arguments(args, kwargs, cache)
            if len(captured) == len(blocks):
                raise _Reached

        return capture

    _run_with_hooks([(block, capture_of(name)) for name, block in blocks.items()], run_model)
    if missing := blocks.keys() - captured.keys():
        raise NumericsError(
            f"{', '.join(sorted(missing))}, which the model family lists, do not run"
        )
    return captured


def _cached_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: ActivationCache
) -> Arguments:
    """Return a block's arguments without its hidden states, with floating-point tensors cached."""

    def cached_if_floating(tensor: Tensor) -> Tensor | CachedTensor:
        return cache.keep(tensor) if tensor.is_floating_point() else tensor

    rest = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
    cached: Arguments = map_instances(Tensor, cached_if_floating, (args[1:], rest))
    return cached


def _run_with_hooks(
    hooks: Iterable[tuple[nn.Module, Callable[..., None]]], run_model: Callable[[], object]
) -> None:
    """Run a model until one of these hooks, called before its module runs, has seen enough."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        with torch.inference_mode(), contextlib.suppress(_Reached):
            run_model()
    finally:
        for handle in handles:
            handle.remove()


def input_of(
    block: nn.Module,
    inner: nn.Module,
    batch: BlockBatch,
    done: Mapping[str, nn.Module],
    cache: ActivationCache,
    runs: int = 1,
) -> Tensor:
    """Run a block up to a module inside it and return what that receives for one batch.

    Args:
        block: the block to run.
        inner: the module.
        batch: on its way through the block.
        done: layers whose outputs will not change any more; they are remembered.
        cache: keeps those outputs.
        runs: how often the module runs in the block.

    Returns:
        What it receives; where it runs several times, the rows of all runs, ``[1, n, K]``.

    Raises:
        NumericsError: the module does not run in the block.
    """
    received: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(first_input(args, kwargs))
        if len(received) == runs:
            raise _Reached

    with _remembering(batch, done, cache):
        _run_with_hooks([(inner, capture)], partial(batch.run, block))
    if len(received) != runs:
        raise NumericsError("a module listed by the model family does not run in its block")
    return joined_runs(received)


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
    repeated: Collection[str] = (),
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
        repeated: names of layers that run several times in the block; the rows of all runs are
            kept together, ``[1, n, N]``.

    Returns:
        Outputs by layer and norm.
    """
    outputs: dict[str, CachedTensor] = {}
    of_runs: dict[str, list[Tensor]] = {}
    norm_inputs: dict[str, Tensor] = {}

    def keep_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            unbiased = output if module.bias is None else output - module.bias
            if name in repeated:
                of_runs.setdefault(name, []).append(unbiased)
            else:
                owned = module.bias is not None
                outputs[name] = cache.keep(unbiased, layer_dtype or dtype, owned=owned)

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
        for name, tensors in of_runs.items():
            outputs[name] = cache.keep(joined_runs(tensors), layer_dtype or dtype)
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

    def remember(name: str, cache: ActivationCache) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            batch.remembered.setdefault(name, []).append(cache.keep(output))

        return hook

    try:
        for name, layer in done.items():
            if name in batch.remembered:
                # An attribute of the instance hides the method of the class.
                layer.forward = _replaying(layer.forward, batch.remembered[name], cache)
                patched.append(layer)
            elif cache is not None:
                handles.append(layer.register_forward_hook(remember(name, cache)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in patched:
            del layer.forward


def _replaying(
    compute: Callable[..., Tensor], remembered: list[CachedTensor], cache: ActivationCache | None
) -> Callable[..., Tensor]:
    """Return a forward that gives remembered outputs, one a run, and computes further ones."""
    replayed = iter(tuple(remembered))

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output = next(replayed, None)
        if output is not None:
            return output.value()
        computed = compute(*args, **kwargs)
        if cache is not None:
            remembered.append(cache.keep(computed))
        return computed

    return forward


def joined_runs(tensors: Sequence[Tensor]) -> Tensor:
    """Return the rows of several runs of a layer together, ``[1, n, K]``; one run's as they are."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.flatten(0, -2) for tensor in tensors])[None]
