"""Moving calibration batches through a model, block by block.

What moves batches and what a method does with a block are two things: merging and quantization
both drive a ``BlockRunner`` and look at its batches between two blocks.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import (
    BlockBatch,
    advance,
    capture_arguments,
    capture_block_batches,
)
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.models import Block, ModelFamily
from epmq_deploy.models.token_batch import tokens_read
from epmq_deploy.models.tokens import TokenWeights, weights_of_runs

# Per task, a function that yields batches of model inputs.
TaskBatches = Mapping[str, Callable[[], Iterable[tuple[Tensor, ...]]]]


class ModuleSource(Protocol):
    """A model for every task, whole or one module at a time."""

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """Return a task's model; the weights of the modules ``without`` are not needed."""
        ...

    def module(self, task: str, name: str) -> nn.Module:
        """Return one module of a task's model by dotted name."""
        ...


class SameForAllTasks:
    """One model that all tasks share."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def become(self, task: str, *, without: Collection[str] = ()) -> nn.Module:
        """Return the model."""
        return self._model

    def module(self, task: str, name: str) -> nn.Module:
        """Return one of the model's modules."""
        return self._model.get_submodule(name)


@dataclass
class CalibrationBatch:
    """One batch of a task, at the entrance of a block.

    Attributes:
        tokens: which tokens count, by stream.
        student: what the block receives in the model that batches run through.
        expert: what it receives in the task's expert, where experts run along.
    """

    tokens: Mapping[str, TokenWeights]
    student: BlockBatch
    expert: BlockBatch | None = None

    def token_weights(
        self, stream: str, activations: Tensor, unpooled: float, runs: int = 1
    ) -> Tensor | None:
        """Return the weight of each token of a stream, float32 ``[B, T]``; None when all weigh 1.

        Args:
            stream: whose tokens ``activations`` hold.
            activations: ``[B, T, ...]``, or what a layer receives in several runs, ``[1, n, ...]``.
            unpooled: weight of tokens that no head reads, 1 where all of them matter.
            runs: how many runs of a layer ``activations`` are of.
        """
        tokens, device = self.tokens[stream], activations.device
        if runs == 1:
            return tokens.weights(activations.shape, unpooled, device)
        shape = self.student.hidden.peek().shape
        weights = tokens.weights(shape, unpooled, device)
        if weights is None:
            weights = torch.ones(shape[:2], device=device)
        return weights_of_runs(weights, activations.shape[1])


class BlockRunner:
    """Moves every task's batches through the blocks of a model, and of the experts next to it.

    Args:
        family: the models' family.
        blocks: all blocks, in the order they run.
        batches: model inputs by task; without tasks nothing runs.
        student: whose blocks batches run through.
        experts: models whose blocks they run through as well, None for none.
        cache: keeps what blocks receive.
        device: where to run.
        dtype: to keep hidden states in; default: their own.
        products: dtype in which blocks multiply matrices, where they run in that dtype.

    Attributes:
        batches: by task, at the entrance of the current block.
    """

    def __init__(
        self,
        family: ModelFamily,
        blocks: Sequence[Block],
        batches: TaskBatches,
        student: ModuleSource,
        *,
        experts: ModuleSource | None = None,
        cache: ActivationCache,
        device: torch.device,
        dtype: torch.dtype | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        self._family = family
        self._blocks = blocks
        self._inputs = batches
        self._student = student
        self._experts = experts
        self._cache = cache
        self._device = device
        self._dtype = dtype
        self._products = products
        self._streams = {block.stream for block in blocks} | {
            block.stream_of(group) for block in blocks for group in block.groups
        }
        self.batches: dict[str, list[CalibrationBatch]] = {task: [] for task in batches}

    def enter(self, block: Block) -> None:
        """Bring the batches to a block, to be called in the order of blocks.

        Everything before a stream's first block runs now, with earlier streams as they are by now;
        to its other blocks ``advance`` has taken the batches already.

        Raises:
            NumericsError: the block does not run as the family says.
        """
        index = self._blocks.index(block)
        if any(earlier.stream == block.stream for earlier in self._blocks[:index]):
            self._take_arguments(block.arguments or "")
            return
        # One that repeats runs itself on the way to its later runs.
        ahead = [later.name for later in self._blocks[index + (block.repeats > 1) :]]
        for task, inputs_of_task in self._inputs.items():
            # Freed before the new ones are captured.
            self.batches[task] = []
            student = self._student.become(task, without=ahead)
            expert = self._experts.become(task, without=ahead) if self._experts else None
            for inputs in inputs_of_task():
                self.batches[task] += self._captured(student, expert, block, inputs)

    def _captured(
        self,
        student: nn.Module,
        expert: nn.Module | None,
        block: Block,
        inputs: tuple[Tensor, ...],
    ) -> list[CalibrationBatch]:
        """Return a batch of inputs at the entrance of a block, one for each of its repeats."""
        tokens = {
            name: tokens_read(self._family.tokens(*inputs, stream=name), inputs)
            for name in self._streams
        }
        of_student = self._captured_in(student, block, inputs)
        of_expert: Sequence[BlockBatch | None] = [None] * block.repeats
        if expert is not None:
            of_expert = self._captured_in(expert, block, inputs)
        return [CalibrationBatch(tokens, *pair) for pair in zip(of_student, of_expert, strict=True)]

    def _captured_in(
        self, model: nn.Module, first: Block, inputs: tuple[Tensor, ...]
    ) -> list[BlockBatch]:
        on_device = [value.to(self._device) for value in inputs]
        run = partial(self._family.embed, model, *on_device)
        captured = capture_block_batches(
            model.get_submodule(first.name),
            run,
            self._cache,
            self._dtype,
            torch.float32 if self._family.float32_blocks else self._products,
            first.repeats,
        )
        stream = [block for block in self._blocks if block.stream == first.stream]
        others = dict.fromkeys(block.arguments for block in stream if block.arguments is not None)
        if others:
            (batch,) = captured
            named = {name: model.get_submodule(name) for name in others}
            batch.arguments = capture_arguments(named, run, self._cache)
            batch.arguments[""] = batch.args, batch.kwargs
        return captured

    def _take_arguments(self, name: str) -> None:
        """Give batches the arguments of the block of this name, where blocks differ in theirs."""
        for batches in self.batches.values():
            for batch in batches:
                for of_model in (batch.student, batch.expert):
                    if of_model is not None and of_model.arguments:
                        of_model.args, of_model.kwargs = of_model.arguments[name]

    def advance(self, block: Block, done: Mapping[str, nn.Module] | None = None) -> None:
        """Take all batches through the student's block to the next one.

        Args:
            block: where they are; its weights are final.
            done: its layers whose outputs may have been remembered; see ``input_of``.
        """
        for task, batches in self.batches.items():
            module = self._student.module(task, block.name)
            for batch in batches:
                self.step(block, module, batch.student, done)

    def advance_experts(self, block: Block) -> None:
        """Take all batches through the experts' blocks to the next one, where experts run along."""
        for task, batches in self.batches.items():
            if self._experts is None or not batches:
                continue
            module = self._experts.module(task, block.name)
            for batch in batches:
                if batch.expert is not None:
                    self.step(block, module, batch.expert)

    def step(
        self,
        block: Block,
        module: nn.Module,
        batch: BlockBatch,
        done: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Take one batch through one model's block to the next one."""
        advance(module, batch, self._cache, dtype=self._dtype, done=done, passed_on=block.passes_on)
