"""Corrections on disk: one file next to the codes, where there are any."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epmq_deploy.quantization.residuals.factors import LayerResiduals, ModelResiduals

RESIDUALS_FILE = "residuals.safetensors"


def save_residuals(folder: Path, residuals: ModelResiduals) -> None:
    """Write ``residuals.safetensors``: per layer the fields of `LayerResiduals`.

    A model without corrections has no such file.
    """
    if not residuals.layers:
        return
    tensors = {
        f"{name}.{key}": part.contiguous()
        for name, layer in residuals.layers.items()
        for key, part in layer.tensors.items()
    }
    save_file(tensors, folder / RESIDUALS_FILE, metadata={"tasks": json.dumps(residuals.tasks)})


def load_residuals(folder: Path) -> ModelResiduals:
    """Load the corrections of all layers; none where there is no such file."""
    file = folder / RESIDUALS_FILE
    if not file.is_file():
        return ModelResiduals()
    with safe_open(file, framework="pt") as handle:
        tasks = tuple(json.loads(handle.metadata()["tasks"]))
    fields: dict[str, dict[str, object]] = {}
    for name, tensor in load_file(file).items():
        layer, _, key = name.rpartition(".")
        fields.setdefault(layer, {})[key] = tensor
    layers = {name: LayerResiduals(**parts) for name, parts in fields.items()}  # type: ignore[arg-type]
    return ModelResiduals(tasks, layers)
