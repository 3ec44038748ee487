"""The graphs a model becomes: one, or several for a text-generation model with an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from epmq_deploy.data.heads import build_heads
from epmq_deploy.exporters.graphs.text_generation import comparison_inputs, text_generation_graphs
from epmq_deploy.exporters.verification.parity import ParityInputs, parity_inputs
from epmq_deploy.models import Deployable, ModelFamily, MultiTaskModel, TaskHead
from epmq_deploy.models.text_generation.base import generates_text
from epmq_deploy.progress import Progress
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.recipe import Task


@dataclass(frozen=True)
class Part:
    """One graph to export.

    Attributes:
        model: runs it in torch.
        example: inputs to trace it with.
        samples: inputs to compare it on.
    """

    model: Deployable
    example: tuple[Tensor, ...]
    samples: ParityInputs

    def layers_of(self, layers: Mapping[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
        """Return those that are part of the graph."""
        return {name: layer for name, layer in layers.items() if self.model.runs(name)}


def parts_of(
    tasks: Mapping[str, Task],
    family: ModelFamily,
    backbone: nn.Module,
    folder: Path,
    *,
    device: torch.device | None,
    progress: Progress,
) -> tuple[tuple[Part, ...], dict[str, TaskHead]]:
    """Return what a backbone becomes, and the heads in it by task.

    Args:
        tasks: the recipe's.
        family: the backbone's.
        backbone: the merged one.
        folder: it was loaded from.
        device: where heads are built.
        progress: shows one step per head.

    Raises:
        MismatchError: names every head that cannot be built or does not fit.
    """
    example = family.example_inputs(folder, 2)
    samples = parity_inputs(tasks, family, folder, example)
    if generates_text(family):
        return tuple(
            Part(graph, graph.example_inputs(), comparison_inputs(graph, samples))
            for graph in text_generation_graphs(family, backbone)
        ), {}
    samples = replace(samples, real=[family.tokens(*inputs).real for inputs in samples.batches])
    width = family.embedding_width(backbone, folder)
    heads = build_heads(tasks, family, folder, width, device=device, progress=progress)
    return (Part(MultiTaskModel(family, backbone, heads), example, samples),), heads
