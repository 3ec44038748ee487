"""The quantized artifact on disk: codes, grids, replaced parameters and the report."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from epmq_deploy.checkpoints.memory_map import MappedFile
from epmq_deploy.checkpoints.tensors import tensors_of_file
from epmq_deploy.data.heads import HEADS_FILE, load_heads, save_heads
from epmq_deploy.models.head import TaskHead
from epmq_deploy.quantization.residuals.artifact import save_residuals
from epmq_deploy.quantization.results import (
    LayerInputs,
    LayerReport,
    QuantizedLinear,
    QuantizedModel,
)

CODES_FILE = "quantized.safetensors"
REPLACED_FILE = "replaced.safetensors"
INPUTS_FILE = "inputs.safetensors"
REPORT_FILE = "report.json"


def save_artifact(folder: Path, quantized: QuantizedModel) -> None:
    """Write ``quantized.safetensors`` (per layer ``.codes`` uint8 ``[N, K]``, ``.scales`` float32
    and ``.zero_points`` uint8 ``[N, G]``), ``replaced.safetensors``, ``inputs.safetensors`` (per
    layer the fields of `LayerInputs`; empty without activations) and ``report.json``;
    ``heads.safetensors`` where heads were re-fitted, and ``residuals.safetensors`` where layers
    have corrections for tasks.
    """
    tensors, layers = {}, {}
    for name, linear in quantized.layers.items():
        tensors[f"{name}.codes"] = linear.codes.contiguous()
        tensors[f"{name}.scales"] = linear.scales.contiguous()
        tensors[f"{name}.zero_points"] = linear.zero_points.contiguous()
        layers[name] = [linear.bits, linear.group_size, linear.symmetric]
    save_file(tensors, folder / CODES_FILE, metadata={"layers": json.dumps(layers)})
    save_file(quantized.replaced, folder / REPLACED_FILE)
    if quantized.heads:
        save_heads(folder, quantized.heads)
    _save_inputs(folder, quantized.inputs)
    save_residuals(folder, quantized.residuals)
    reports = [asdict(report) for report in quantized.reports]
    (folder / REPORT_FILE).write_text(json.dumps(reports, indent=2) + "\n")


def _save_inputs(folder: Path, inputs: Mapping[str, LayerInputs]) -> None:
    """Write ``inputs.safetensors``."""
    tensors = {}
    for name, layer in inputs.items():
        # Layers that share their input share these tensors, which safetensors refuses.
        tensors[f"{name}.low"] = layer.low.clone()
        tensors[f"{name}.high"] = layer.high.clone()
        tensors[f"{name}.square"] = layer.square.clone()
        tensors[f"{name}.output"] = torch.tensor(layer.output, dtype=torch.float64)
    save_file(tensors, folder / INPUTS_FILE)


def load_inputs(folder: Path) -> dict[str, LayerInputs]:
    """Load what calibration saw of layers' inputs, by layer name; empty without activations."""
    tensors = load_file(folder / INPUTS_FILE)
    names = [key.removesuffix(".output") for key in tensors if key.endswith(".output")]
    return {
        name: LayerInputs(
            low=tensors[f"{name}.low"],
            high=tensors[f"{name}.high"],
            square=tensors[f"{name}.square"],
            output=float(tensors[f"{name}.output"]),
        )
        for name in names
    }


def load_refitted_heads(folder: Path) -> dict[str, TaskHead]:
    """Load re-fitted heads by task; none where heads stayed as they were."""
    return load_heads(folder) if (folder / HEADS_FILE).is_file() else {}


def load_reports(folder: Path) -> list[LayerReport]:
    """Load the reports of all layers, in running order."""
    return [
        LayerReport(**report)
        for report in json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    ]


def load_artifact(folder: Path) -> tuple[dict[str, QuantizedLinear], Mapping[str, Tensor]]:
    """Load layers by name, mapped from their file, and replaced parameters by name."""
    with safe_open(folder / CODES_FILE, framework="pt") as handle:
        grids = json.loads(handle.metadata()["layers"])
    mapped = MappedFile(folder / CODES_FILE)
    tensors = {info.key: mapped.tensor(info) for info in tensors_of_file(folder / CODES_FILE)}
    layers = {
        name: QuantizedLinear(
            tensors[f"{name}.codes"],
            tensors[f"{name}.scales"],
            tensors[f"{name}.zero_points"],
            bits,
            group_size,
            symmetric,
        )
        for name, (bits, group_size, symmetric) in grids.items()
    }
    return layers, load_file(folder / REPLACED_FILE)
