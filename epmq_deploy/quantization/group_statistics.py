"""Statistics of layers that share an input, from calibration samples or from weights alone."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from epmq_deploy.calibration.block_runner import BlockRunner
from epmq_deploy.calibration.statistics import Accumulator, GroupSums, TaskStatistics
from epmq_deploy.errors import NumericsError
from epmq_deploy.models import Block, Group
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.base import QuantizationMethod
from epmq_deploy.quantization.data_free import weight_statistics
from epmq_deploy.quantization.expert_features import Features
from epmq_deploy.quantization.expert_source import ExpertWeights

log = logging.getLogger(__name__)

# What a group of layers receives for one batch, by task and the batch's index.
GroupInput = Callable[[str, int], Tensor]


class StatisticsSource(Protocol):
    """Where one task's statistics of a group of layers come from."""

    @property
    def tasks(self) -> Collection[str]:
        """Names of the tasks."""
        ...

    def of_task(
        self,
        task: str,
        block: Block,
        group: Group,
        names: Sequence[str],
        inputs: GroupInput,
        features: Features,
    ) -> TaskStatistics:
        """Return one task's statistics of some layers of a group.

        Args:
            task: the task.
            block: the group's block.
            group: layers that share an input.
            names: dotted names of those that are quantized.
            inputs: what they receive.
            features: what experts' layers gave.

        Raises:
            NumericsError: no tokens reach the layers, or activations are not finite.
        """
        ...


class ActivationStatistics:
    """Statistics of what calibration samples show.

    Args:
        runner: holds the batches.
        experts: whose weights outputs are computed with; None where no method needs them.
        mix: share of the experts' own outputs in the outputs aimed at.
        unpooled: weight, in the last block, of tokens that no head reads.
        accumulator: makes an empty sum over one task's batches.
    """

    def __init__(
        self,
        runner: BlockRunner,
        experts: ExpertWeights | None,
        *,
        mix: float,
        unpooled: float,
        accumulator: Callable[[], Accumulator],
    ) -> None:
        self._runner = runner
        self._experts = experts
        self._mix = mix
        self._unpooled = unpooled
        self._accumulator = accumulator

    @property
    def tasks(self) -> Collection[str]:
        """Names of the tasks with batches."""
        return self._runner.batches

    def of_task(
        self,
        task: str,
        block: Block,
        group: Group,
        names: Sequence[str],
        inputs: GroupInput,
        features: Features,
    ) -> TaskStatistics:
        """Return means over the tokens of a task's batches."""
        weights = self._expert_weights(task, names)
        recorded = features.get(task, ())
        accumulator = self._accumulator()
        unpooled = self._unpooled if group.pooled else 1.0
        for index, batch in enumerate(self._runner.batches[task]):
            received = inputs(task, index)
            outputs = {name: recorded[index][name].peek() for name in names if recorded}
            token_weights = batch.token_weights(block.stream_of(group), received, unpooled)
            accumulator.add(received, token_weights, weights, outputs, self._mix)
        return accumulator.statistics()

    def _expert_weights(self, task: str, names: Sequence[str]) -> Mapping[str, Tensor | None]:
        """Weights ``[N, K]`` by layer; None for each where only the experts' outputs count."""
        if self._experts is None:
            return {}
        if self._mix < 1:
            return {name: self._experts.tensor(task, f"{name}.weight") for name in names}
        return dict.fromkeys(names)


class WeightStatistics:
    """Statistics that stand in for those of samples, from task vectors.

    Args:
        experts: base and experts.
    """

    def __init__(self, experts: ExpertWeights) -> None:
        self._experts = experts

    @property
    def tasks(self) -> Collection[str]:
        """Names of the experts."""
        return self._experts.tasks

    def of_task(
        self,
        task: str,
        block: Block,
        group: Group,
        names: Sequence[str],
        inputs: GroupInput,
        features: Features,
    ) -> TaskStatistics:
        """Return what the layers' task vectors tell of their inputs."""
        weights = {name: self._experts.tensor(task, f"{name}.weight") for name in names}
        bases = {name: self._experts.base_tensor(f"{name}.weight") for name in names}
        return weight_statistics(weights, bases)


def sum_over_tasks(
    model: nn.Module,
    names: Sequence[str],
    tasks: Collection[str],
    statistics_of: Callable[[str], TaskStatistics],
    experts: ExpertWeights | None,
    method: QuantizationMethod[Any],
    options: QuantizeOptions,
) -> GroupSums:
    """Sum statistics over tasks, holding one task's Gram matrix at a time.

    Args:
        model: the student.
        names: dotted names of layers that share an input.
        tasks: names of the tasks.
        statistics_of: gathers one task's statistics.
        experts: whose biases belong to the outputs aimed at; None where those are the model's own.
        method: weighs the tasks.
        options: of the method.

    Raises:
        NumericsError: names layer and task.
    """
    layers = {name: linear_layer(model, name) for name in names}
    first = layers[names[0]]
    sums = GroupSums.zeros(first.in_features, first.weight.device)
    for task in tasks:
        try:
            statistics = statistics_of(task)
        except NumericsError as error:
            raise NumericsError(f"layer {names[0]}: task {task!r}: {error}") from error
        biases = {}
        if experts is not None:
            biases = {
                name: experts.tensor(task, f"{name}.bias")
                for name, layer in layers.items()
                if layer.bias is not None
            }
        sums.add(statistics, method.task_weight(statistics, options), biases)
    if 0 < sums.tokens < 2 * first.in_features:
        log.warning(
            "%s: %d calibration tokens for %d input columns; at least %d are advisable, "
            "add samples",
            names[0],
            sums.tokens,
            first.in_features,
            2 * first.in_features,
        )
    return sums
