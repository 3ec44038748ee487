"""Corrections of tasks in a graph: an input ``task``, and two small products for each layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from epmq_deploy.exporters.graphs.swap import replace_module
from epmq_deploy.exporters.lowering.corrections import CORRECT, CORRECTIONS_DOMAIN
from epmq_deploy.exporters.lowering.layers import LAYER_KEY
from epmq_deploy.exporters.verification.parity import Outputs, torch_outputs
from epmq_deploy.models.deployable import TASK_INPUT, Deployable
from epmq_deploy.quantization.residuals.factors import ModelResiduals
from epmq_deploy.quantization.residuals.per_sample import (
    BatchTasks,
    corrected,
)


class ModelOfTasks(Deployable):
    """A model with an input that says which task each sample belongs to.

    Args:
        model: what runs; shared, not copied.
    """

    def __init__(self, model: Deployable) -> None:
        super().__init__()
        self.model = model
        self.tasks = BatchTasks()

    @property
    def stem(self) -> str:  # type: ignore[override]
        """Return the model's."""
        return self.model.stem

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """Return the model's."""
        return self.model.backbone

    @property
    def input_names(self) -> tuple[str, ...]:
        """Return the model's and ``task``."""
        return (*self.model.input_names, TASK_INPUT)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Return the model's."""
        return self.model.output_names

    def dynamic_axes(self) -> tuple[dict[int, str], ...]:
        """Return the model's; ``task`` has one number a sample."""
        axes = self.model.dynamic_axes()
        return (*axes, {0: axes[0][0]})

    def runs(self, layer: str) -> bool:
        """Whether a layer is part of the model."""
        return self.model.runs(layer)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the model on inputs ``[batch, ...]``; the last one, ``[batch]``, holds the tasks."""
        *own, self.tasks.numbers = inputs
        try:
            outputs: tuple[Tensor, ...] = self.model(*own)
        finally:
            self.tasks.numbers = None
        return outputs


class Correction(nn.Module):
    """What one layer adds for each sample's task: a placeholder that `LowerCorrections` replaces.

    Args:
        name: the layer's dotted name; it travels with the node.
        outputs: ``N``.
        tasks: of the batch that runs.
    """

    def __init__(self, name: str, outputs: int, tasks: BatchTasks) -> None:
        super().__init__()
        self.layer_name, self.outputs, self.tasks = name, outputs, tasks

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, ..., N]`` for inputs ``[batch, ..., K]``."""
        assert self.tasks.numbers is not None, "a batch runs"
        # One row or one sequence a sample.
        rows = x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        output: Tensor = torch.onnx.ops.symbolic(
            f"{CORRECTIONS_DOMAIN}::{CORRECT}",
            [rows, self.tasks.numbers],
            {"layer": self.layer_name},
            dtype=x.dtype,
            shape=(*rows.shape[:-1], self.outputs),
            version=1,
            metadata_props={LAYER_KEY: self.layer_name},
        )
        return output if x.dim() == 3 else output.reshape(*x.shape[:-1], self.outputs)


class CorrectedLinear(nn.Module):
    """A layer with its corrections.

    Args:
        layer: what stands in for it in the graph.
        added: its corrections.
    """

    def __init__(self, layer: nn.Module, added: Correction) -> None:
        super().__init__()
        self.layer = layer
        self.added = added

    @property
    def weight(self) -> Tensor:
        """The layer's, at whose dtype models may look."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor), "a linear layer's"
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, ..., K]`` to ``[batch, ..., N]``."""
        output: Tensor = self.layer(x) + self.added(x)
        return output


def add_corrections(twin: ModelOfTasks, residuals: ModelResiduals) -> None:
    """Put corrected layers in the place of a model's layers."""
    for name, layer in residuals.layers.items():
        corrected = CorrectedLinear(
            twin.backbone.get_submodule(name), Correction(name, layer.left.shape[1], twin.tasks)
        )
        replace_module(twin.backbone, name, corrected)


def mixed_tasks(batches: Sequence[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
    """Return batches with a ``task`` input that goes through all tasks, from sample to sample."""
    start, mixed = 0, []
    for batch in batches:
        samples = len(batch[0])
        mixed.append((*batch, torch.arange(start, start + samples) % count))
        start += samples
    return mixed


def torch_outputs_of_tasks(
    model: Deployable, batches: Sequence[tuple[Tensor, ...]], residuals: ModelResiduals
) -> Outputs:
    """Return what a model gives per batch, its samples being of all tasks in turn.

    Args:
        model: computes without corrections, and is left so.
        batches: without tasks; see ``mixed_tasks``.
        residuals: of its layers; without any, tasks play no part.
    """
    if not residuals.layers:
        return torch_outputs(model, batches)
    of_tasks = ModelOfTasks(model)
    with corrected(model.backbone, residuals, of_tasks.tasks):
        return torch_outputs(of_tasks, mixed_tasks(batches, len(residuals.tasks)))
