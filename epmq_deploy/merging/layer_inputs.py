"""What linear layers receive when models run on calibration data, for methods that need it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.activations import joined_runs
from epmq_deploy.calibration.block_runner import BlockRunner, CalibrationBatch, SameForAllTasks
from epmq_deploy.calibration.cache import ActivationCache
from epmq_deploy.calibration.statistics import Accumulator
from epmq_deploy.errors import NumericsError
from epmq_deploy.merging.base import CalibrationData
from epmq_deploy.models import Block, Group
from epmq_deploy.models.modules import first_input
from epmq_deploy.options.merging import ActivationOptions


def runner_of(
    data: CalibrationData,
    model: nn.Module,
    blocks: Sequence[Block],
    options: ActivationOptions,
    *,
    student: nn.Module | None = None,
) -> BlockRunner:
    """Return a runner that takes every task's batches through blocks.

    Args:
        data: samples and experts.
        model: any model of their family, for its device.
        blocks: all blocks, in the order they run.
        options: say how batches are formed and kept.
        student: the model whose blocks batches run through; None for each task's expert.
    """
    return BlockRunner(
        data.family,
        blocks,
        {task: partial(data.batches, task, options.batch_size) for task in data.tasks},
        data.experts if student is None else SameForAllTasks(student),
        cache=ActivationCache(options.cache_bytes),
        device=next(model.parameters()).device,
    )


def input_grams(
    runner: BlockRunner,
    data: CalibrationData,
    task: str,
    block: Block,
    student: nn.Module | None = None,
) -> list[Tensor]:
    """Return the mean over tokens of ``x x^T`` of what a task's expert's layers receive in a block.

    Padding does not count. Without a student the task's batches go on to the next block.

    Returns:
        One float32 ``[K, K]`` for each group of layers that share their input.

    Raises:
        NumericsError: a sum is not finite; names block and task.
    """
    expert = data.experts.module(task, block.name)
    sums = [Accumulator() for _ in block.groups]
    firsts = [expert.get_submodule(block.inner(group.layers[0])) for group in block.groups]
    for batch in runner.batches[task]:
        with _accumulating(firsts, sums, block, batch):
            if student is None:
                runner.step(block, expert, batch.student)
            else:
                with torch.inference_mode():
                    batch.student.run(expert)
    try:
        return [accumulator.statistics().gram for accumulator in sums]
    except NumericsError as error:
        raise NumericsError(f"{block.name}: task {task!r}: {error}") from error


@contextmanager
def _accumulating(
    layers: Sequence[nn.Module],
    sums: Sequence[Accumulator],
    block: Block,
    batch: CalibrationBatch,
) -> Iterator[None]:
    """Add what the first layer of each group of a block receives to its sums."""

    def hook(accumulator: Accumulator, group: Group) -> Callable[..., None]:
        received: list[Tensor] = []

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            received.append(first_input(args, kwargs))
            if len(received) == group.runs:
                inputs = joined_runs(received)
                stream = block.stream_of(group)
                accumulator.add(inputs, batch.token_weights(stream, inputs, 1.0, group.runs))

        return add

    handles = [
        layer.register_forward_pre_hook(hook(accumulator, group), with_kwargs=True)
        for layer, accumulator, group in zip(layers, sums, block.groups, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
