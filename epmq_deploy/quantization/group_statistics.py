"""Statistics of layers that share an input, from calibration samples or from weights alone.

Without samples, task vectors stand in for them: fine-tuning updates of a linear layer are sums of
``gradient x^T`` over its inputs ``x``, so a task vector's rows lie in the span of the inputs its
task was trained on, and ``tau^T tau`` takes the place of ``X^T X`` (as in WUDI-Merging, Cheng et
al., arXiv 2503.08099).
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epmq_deploy.calibration.block_runner import BlockRunner
from epmq_deploy.calibration.statistics import Accumulator, GroupSums, TaskStatistics
from epmq_deploy.errors import NumericsError
from epmq_deploy.models.modules import linear_layer
from epmq_deploy.options.quantization import QuantizeOptions
from epmq_deploy.quantization.base import CalibrationSettings, QuantizationMethod
from epmq_deploy.quantization.expert_features import Features
from epmq_deploy.quantization.expert_source import ExpertWeights
from epmq_deploy.quantization.guidance import Gradients, guided

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupInputs:
    """Layers that share an input, and how to get that input.

    Attributes:
        layers: dotted names.
        stream: whose tokens the input holds.
        pooled: whether only what the layers give for pooled tokens reaches the heads.
        input_of: what they receive for one batch ``[B, T, K]``, by task and the batch's index.
        features: what the experts' layers gave.
        runs: how often the layers run in their block; of several, ``input_of`` and ``features``
            hold the rows of all, ``[1, n, ...]``.
    """

    layers: Sequence[str]
    stream: str
    pooled: bool
    input_of: Callable[[str, int], Tensor]
    features: Features
    runs: int = 1


class StatisticsSource(Protocol):
    """Where one task's statistics of a group of layers come from."""

    @property
    def tasks(self) -> Collection[str]:
        """Names of the tasks."""
        ...

    def of_task(self, task: str, group: GroupInputs) -> TaskStatistics:
        """Return one task's statistics of a group of layers.

        Raises:
            NumericsError: no tokens reach the layers, or activations are not finite.
        """
        ...


class ActivationStatistics:
    """Statistics of what calibration samples show.

    Args:
        runner: holds the batches.
        experts: whose weights outputs are computed with; None where the method aims at none.
        settings: of the method.
        gradients: of the samples, for methods whose token weights they guide.
    """

    def __init__(
        self,
        runner: BlockRunner,
        experts: ExpertWeights | None,
        settings: CalibrationSettings,
        gradients: Gradients | None = None,
    ) -> None:
        self._runner = runner
        self._experts = experts
        self._settings = settings
        self._gradients = gradients or {}

    @property
    def tasks(self) -> Collection[str]:
        """Names of the tasks with batches."""
        return self._runner.batches

    def of_task(self, task: str, group: GroupInputs) -> TaskStatistics:
        """Return means over the tokens of a task's batches."""
        weights = self._expert_weights(task, group.layers)
        features = group.features.get(task, ())
        unpooled = self._settings.unpooled if group.pooled else 1.0
        accumulator = Accumulator(self._settings.products)
        for index, batch in enumerate(self._runner.batches[task]):
            inputs = group.input_of(task, index)
            outputs = {name: features[index][name].peek() for name in group.layers if features}
            token_weights = batch.token_weights(group.stream, inputs, unpooled, group.runs)
            if task in self._gradients:
                squares = self._squares(task, index, group).to(inputs.device)
                token_weights = guided(token_weights, squares, self._settings.guidance)
            accumulator.add(inputs, token_weights, weights, outputs, self._settings.mix)
        return accumulator.statistics()

    def _squares(self, task: str, index: int, group: GroupInputs) -> Tensor:
        """Return the squared gradients of the tokens that a batch of a group's inputs holds."""
        batches = self._gradients[task]
        # A block that repeats has several batches for each one of samples.
        repeats = len(self._runner.batches[task]) // len(batches)
        runs = batches[index // repeats][group.layers[0]]
        first = (index % repeats) * group.runs
        runs = runs[first : first + group.runs]
        return runs[0] if group.runs == 1 else torch.cat([run.flatten() for run in runs])[None]

    def _expert_weights(self, task: str, layers: Sequence[str]) -> Mapping[str, Tensor | None]:
        """Return weights ``[N, K]`` by layer, None for each where only outputs count."""
        if self._experts is None:
            return {}
        if self._settings.mix < 1:
            return {name: self._experts.tensor(task, f"{name}.weight") for name in layers}
        return dict.fromkeys(layers)


class WeightStatistics:
    """Statistics from task vectors alone.

    Args:
        experts: base and experts.
    """

    def __init__(self, experts: ExpertWeights) -> None:
        self._experts = experts

    @property
    def tasks(self) -> Collection[str]:
        """Names of the experts."""
        return self._experts.tasks

    def of_task(self, task: str, group: GroupInputs) -> TaskStatistics:
        """Return what the layers' task vectors tell of their inputs."""
        experts = {name: self._experts.tensor(task, f"{name}.weight") for name in group.layers}
        bases = {name: self._experts.base_tensor(f"{name}.weight") for name in group.layers}
        return weight_statistics(experts, bases)


def weight_statistics(experts: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> TaskStatistics:
    """Return one task's statistics for layers that share an input, from their task vectors.

    Args:
        experts: weights ``[N, K]`` by layer.
        bases: the base's weights ``[N, K]`` by layer.

    Returns:
        Statistics with the layers' summed ``tau^T tau`` as Gram matrix, the experts' weights as
        what the layers aim at, and neither means nor tokens.
    """
    first = next(iter(experts.values()))
    gram = torch.zeros(first.shape[1], first.shape[1], device=first.device)
    for layer, expert in experts.items():
        vector = (expert - bases[layer]).to(torch.float32)
        gram += vector.T @ vector
    gram = (gram + gram.T) / 2
    return TaskStatistics(
        gram,
        torch.zeros(first.shape[1], dtype=torch.float64, device=first.device),
        tokens=0,
        cross={layer: expert.to(torch.float32) @ gram for layer, expert in experts.items()},
        output_mean={
            layer: torch.zeros(expert.shape[0], dtype=torch.float64, device=expert.device)
            for layer, expert in experts.items()
        },
    )


class GroupStatistics:
    """Sums statistics over tasks, as a method weighs them.

    Args:
        model: the student.
        source: where one task's statistics come from.
        experts: whose biases belong to the outputs aimed at; None where those are the model's own.
        method: weighs the tasks.
        options: of the method.
    """

    def __init__(
        self,
        model: nn.Module,
        source: StatisticsSource,
        experts: ExpertWeights | None,
        method: QuantizationMethod[Any],
        options: QuantizeOptions,
    ) -> None:
        self._model = model
        self._source = source
        self._experts = experts
        self._method = method
        self._options = options

    def sums(
        self, group: GroupInputs, keep: Callable[[str, TaskStatistics], None] | None = None
    ) -> GroupSums:
        """Return sums over all tasks, holding one task's Gram matrix at a time.

        Args:
            group: the layers.
            keep: is given every task's statistics.

        Raises:
            NumericsError: a task has no statistics, or they are not finite; names layer and task.
        """
        first = linear_layer(self._model, group.layers[0])
        sums = GroupSums.zeros(first.in_features, first.weight.device)
        for task in self._source.tasks:
            try:
                statistics = self._source.of_task(task, group)
            except NumericsError as error:
                raise NumericsError(f"layer {group.layers[0]}: task {task!r}: {error}") from error
            if keep is not None:
                keep(task, statistics)
            weight = self._method.task_weight(statistics, self._options)
            sums.add(statistics, weight, self._biases(task, group.layers))
        advisable = 2 * first.in_features
        if 0 < sums.tokens < advisable:
            log.warning(
                "%s: %d calibration tokens for %d input columns; at least %d are advisable, "
                "use more samples",
                group.layers[0],
                sums.tokens,
                first.in_features,
                advisable,
            )
        return sums

    def _biases(self, task: str, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return an expert's biases ``[N]`` by layer."""
        if self._experts is None:
            return {}
        return {
            name: self._experts.tensor(task, f"{name}.bias")
            for name in layers
            if linear_layer(self._model, name).bias is not None
        }
