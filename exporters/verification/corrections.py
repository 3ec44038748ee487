"""Check that an exported file holds the corrections of every task."""

from pathlib import Path

import onnx_ir as ir
import torch

from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters.lowering.corrections import read_corrections
from epmq_deploy.quantization.residuals.factors import LayerResiduals, ModelResiduals


def verify_corrections(path: Path, residuals: ModelResiduals) -> None:
    """Check that a file holds these corrections, bit for bit.

    Raises:
        NumericsError: one is missing or differs; names every layer.
    """
    if not residuals.layers:
        return
    graph = ir.load(path).graph
    problems = [
        name
        for name, layer in residuals.layers.items()
        if not _equal(read_corrections(graph, name), layer)
    ]
    if problems:
        raise NumericsError(
            f"{path.name} does not hold the corrections of tasks: {', '.join(sorted(problems))}"
        )


def _equal(held: LayerResiduals | None, residuals: LayerResiduals) -> bool:
    if held is None or held.tensors.keys() != residuals.tensors.keys():
        return False
    return all(torch.equal(part, residuals.tensors[name]) for name, part in held.tensors.items())
