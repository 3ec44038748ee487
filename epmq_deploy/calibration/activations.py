"""Running one block over calibration batches, stopping and resuming between its layers.

Layers of a block are quantized in the order they run, and each is to see what the quantized earlier
ones give. Rather than running the block from its start for every layer, a batch remembers what the
layers that will not change any more have answered: each linear layer runs once per batch.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.cache import ActivationCache, Kept
from epmq_deploy.compat import map_instances
from epmq_deploy.errors import NumericsError
from epmq_deploy.models.modules import first_input
from epmq_deploy.models.norms import pre_affine

# See ``Block.passes_on``.
PassedOn = tuple[tuple[int, int], ...]


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook once what it was waiting for has been seen."""


@dataclass
class BlockBatch:
    """One batch on its way through the blocks of one model.

    Attributes:
        hidden: hidden states the current block receives.
        args: what else it receives by position; floating-point tensors in it are ``Kept``.
        kwargs: what else it receives by name, likewise.
        products: dtype in which blocks multiply matrices, float32 or bfloat16; hidden states,
            norms and softmax are float32 in either case.
        answers: outputs of layers of the current block that will not change any more.
    """

    hidden: Kept
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    products: torch.dtype = torch.float32
    answers: dict[str, Kept] = field(default_factory=dict)

    def run(self, block: nn.Module) -> tuple[Any, ...]:
        """What the block gives for this batch, hidden states first."""
        hidden = self.hidden.value()
        args, kwargs = map_instances(Kept, Kept.peek, (self.args, self.kwargs))
        low = self.products == torch.bfloat16
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=low):
            output = block(hidden, *args, **kwargs)
        return output if isinstance(output, tuple) else (output,)

    def take(self, outputs: tuple[Any, ...], passed_on: PassedOn, cache: ActivationCache) -> None:
        """Hand outputs of a block on to the next ones, unless those receive something already."""
        args = list(self.args)
        for output, place in passed_on:
            if args[place] is None:
                args[place] = cache.keep(outputs[output])
        self.args = tuple(args)


def capture_block_batch(
    block: nn.Module,
    run_model: Callable[[], object],
    cache: ActivationCache,
    dtype: torch.dtype | None = None,
    products: torch.dtype = torch.float32,
) -> BlockBatch:
    """What the first block receives while ``run_model`` runs; the model stops there.

    Args:
        block: the first block.
        run_model: runs the model on one batch.
        cache: keeps the hidden states.
        dtype: to keep them in; their own when absent.
        products: dtype in which blocks are to multiply matrices.

    Raises:
        NumericsError: the block does not run.
    """
    captured: list[BlockBatch] = []

    def kept(tensor: Tensor) -> Tensor | Kept:
        return cache.keep(tensor) if tensor.is_floating_point() else tensor

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        more, named = map_instances(Tensor, kept, (args[1:], rest))
        captured.append(BlockBatch(cache.keep(hidden, dtype), more, named, products))
        raise _Reached

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
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
    """What a module inside ``block`` receives for one batch; the block stops there.

    Args:
        block: the block to run.
        inner: the module.
        batch: on its way through the block.
        done: layers whose outputs will not change any more; their answers are remembered.
        cache: keeps answers.

    Raises:
        NumericsError: the module does not run in the block.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(first_input(args, kwargs))
        raise _Reached

    handle = inner.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        remembering = _remembering(batch, done, cache)
        with torch.inference_mode(), remembering, contextlib.suppress(_Reached):
            batch.run(block)
    finally:
        handle.remove()
    if not seen:
        raise NumericsError("a module listed by the model family does not run in its block")
    return seen[0]


def advance(
    block: nn.Module,
    batch: BlockBatch,
    cache: ActivationCache,
    *,
    dtype: torch.dtype | None = None,
    done: Mapping[str, nn.Module] | None = None,
    passed_on: PassedOn = (),
) -> None:
    """Take a batch to the next block; its answers are forgotten.

    Args:
        block: the block to run, all of whose layers are done.
        batch: its hidden states are replaced by the block's output.
        cache: keeps them.
        dtype: to keep them in; their own when absent.
        done: layers that may be asked for remembered answers.
        passed_on: see ``Block.passes_on``.
    """
    with torch.inference_mode(), _remembering(batch, done or {}, None):
        outputs = batch.run(block)
    batch.answers.clear()
    batch.hidden = cache.keep(outputs[0], dtype, owned=True)
    batch.take(outputs, passed_on, cache)


def record(
    block: nn.Module,
    batch: BlockBatch,
    layers: Mapping[str, nn.Linear],
    norms: Mapping[str, nn.Module],
    cache: ActivationCache,
    dtype: torch.dtype | None = None,
    answers: torch.dtype | None = None,
    passed_on: PassedOn = (),
) -> dict[str, Kept]:
    """Run an expert's block on one batch, take the batch to the next block, and keep what is seen.

    Args:
        block: the expert's block.
        batch: on its way through the expert.
        layers: linear layers by name; their outputs without bias ``[..., N]`` are kept.
        norms: norms by name; their outputs before gain and bias ``[..., K]`` are kept.
        cache: keeps them.
        dtype: to keep hidden states and norms' outputs in; their own when absent.
        answers: to keep layers' outputs in; as ``dtype`` when absent.
        passed_on: see ``Block.passes_on``.

    Returns:
        What was seen, by layer and norm.
    """
    seen: dict[str, Kept] = {}
    entered: dict[str, Tensor] = {}

    def answer(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.bias is None:
                seen[name] = cache.keep(output, answers or dtype)
            else:
                seen[name] = cache.keep(output - module.bias, answers or dtype, owned=True)

        return hook

    def entry(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            entered[name] = args[0]

        return hook

    handles = [layer.register_forward_hook(answer(name)) for name, layer in layers.items()]
    handles += [norm.register_forward_pre_hook(entry(name)) for name, norm in norms.items()]
    try:
        advance(block, batch, cache, dtype=dtype, passed_on=passed_on)
    finally:
        for handle in handles:
            handle.remove()
    with torch.inference_mode():
        for name, inputs in entered.items():
            seen[name] = cache.keep(pre_affine(norms[name], inputs), dtype, owned=True)
    return seen


@contextlib.contextmanager
def _remembering(
    batch: BlockBatch, done: Mapping[str, nn.Module], cache: ActivationCache | None
) -> Iterator[None]:
    """Let layers that are done answer from memory; what they compute meanwhile is kept."""
    handles = []
    patched = []

    def answered(kept: Kept) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: kept.value()

    def keeping(name: str, target: ActivationCache) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            batch.answers[name] = target.keep(output)

        return hook

    try:
        for name, layer in done.items():
            if name in batch.answers:
                # An attribute of the instance hides the method of the class.
                layer.forward = answered(batch.answers[name])
                patched.append(layer)
            elif cache is not None:
                handles.append(layer.register_forward_hook(keeping(name, cache)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in patched:
            del layer.forward
