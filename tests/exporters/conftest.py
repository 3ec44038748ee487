"""A tiny random CLIP image tower with heads, and its layers on random grids."""

import contextlib
import dataclasses
import io
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from epmq_deploy.exporters import (
    ExportedGraph,
    format_names,
    low_bit_format_names,
    session_config,
    verify_graph,
    write_graphs,
)
from epmq_deploy.models import MultiTaskModel, TaskHead
from epmq_deploy.models.encoders.clip import FAMILY
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.quantization.solver.grid import expand_groups, fit_grid, quantize_to_codes

HIDDEN, MLP, PROJECTION = 64, 112, 32
# Layers outside the blocks: a linear one without bias, a convolution, a table.
OUTSIDE = (
    "visual_projection",
    "vision_model.embeddings.patch_embedding",
    "vision_model.embeddings.position_embedding",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and everything `write_graphs` takes with it."""

    model: MultiTaskModel
    images: Tensor
    layers: dict[str, QuantizedLinear]
    replaced: dict[str, Tensor]

    @property
    def linear(self) -> dict[str, QuantizedLinear]:
        """The layers that multiply: not the convolution, not the table."""
        backbone = self.model.backbone
        return {
            name: layer
            for name, layer in self.layers.items()
            if isinstance(backbone.get_submodule(name), nn.Linear)
        }


def tiny_model() -> MultiTaskModel:
    """Two blocks, seeded; all parameters differ from each other, biases included."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=PROJECTION,
    )
    backbone = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    heads = {
        "cars": TaskHead(torch.randn(7, PROJECTION)),
        "svhn": TaskHead(torch.randn(4, PROJECTION)),
    }
    return MultiTaskModel(FAMILY, backbone, heads).eval()


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> QuantizedLinear:
    """Round to nearest."""
    grid = fit_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_search=False
    )
    columns = weight.shape[1]
    scales = expand_groups(grid.scales, group_size, columns)
    zero_points = expand_groups(grid.zero_points, group_size, columns)
    codes = quantize_to_codes(weight, scales, zero_points, bits).to(torch.uint8)
    return QuantizedLinear(codes, grid.scales, grid.zero_points, bits, group_size, symmetric)


def quantize_rows(weight: Tensor) -> QuantizedLinear:
    """8 bits, one group per row of the flattened weight."""
    flat = weight.flatten(1)
    return quantize(flat, 8, flat.shape[1], True)


def layer_names(model: MultiTaskModel) -> list[str]:
    """All layers inside the blocks."""
    blocks = FAMILY.blocks(model.backbone)
    return [name for block in blocks for name in block.layers]


def make_case(
    choose: Callable[[str, Tensor], tuple[int, int, bool]], outside: Sequence[str] = ()
) -> Case:
    """Quantize each layer with the bits, group size and symmetry chosen for it.

    ``outside`` names layers outside the blocks to store with 8 bits.
    """
    model = tiny_model()
    layers = {}
    for name in layer_names(model):
        weight = model.backbone.get_submodule(name).weight
        layers[name] = quantize(weight, *choose(name, weight))
    for name in outside:
        layers[name] = quantize_rows(model.backbone.get_submodule(name).weight)
    bias = "vision_model.encoder.layers.1.mlp.fc1.bias"
    norm = "vision_model.encoder.layers.0.layer_norm1.weight"
    replaced = {name: torch.randn(size) for name, size in ((bias, MLP), (norm, HIDDEN))}
    return Case(model, torch.randn(2, 3, 16, 16), layers, replaced)


def dequantized_model(case: Case) -> MultiTaskModel:
    """The torch model a quantized graph has to agree with."""
    model = tiny_model()
    parameters = dict(model.backbone.named_parameters())
    for name, layer in case.layers.items():
        weight = parameters[f"{name}.weight"]
        weight.copy_(layer.dequantize().reshape(weight.shape))
    for name, tensor in case.replaced.items():
        parameters[name].copy_(tensor)
    return model


def run(path: Path, images: Tensor, accuracy_level: int = 0) -> list[NDArray]:
    """Outputs of a graph on CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in session_config(accuracy_level).items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": images.numpy()})


def _mixed(name: str, weight: Tensor) -> tuple[int, int, bool]:
    """Every width, blocks and channels, ragged K (112 = 3.5 groups of 32) side by side."""
    columns = weight.shape[1]
    if name.endswith("q_proj"):
        return 2, 16, True
    if name.endswith("k_proj"):
        return 3, 32, False
    if name.endswith("v_proj"):
        return 8, 16, False
    if name.endswith("out_proj"):
        return 8, columns, True
    if name.endswith("fc1"):
        return 4, columns, False
    return 3, 48, True


CHOICES = {
    "symmetric": lambda name, weight: (4, 32, True),
    "asymmetric": lambda name, weight: (4, 32, False),
    "mixed": _mixed,
    "outside": _mixed,
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A case and the graphs written from it, by format name."""

    case: Case
    graphs: dict[str, ExportedGraph]
    printed: str


@pytest.fixture(scope="session", params=CHOICES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each quantization of the tiny model, exported once in every format."""
    case = make_case(CHOICES[request.param], OUTSIDE if request.param == "outside" else ())
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        graphs = export(case, format_names(), folder)
    return Exported(case, {graph.format: graph for graph in graphs}, printed.getvalue())


def export(case: Case, formats: Sequence[str], folder: Path, **options: Any) -> Sequence[Any]:
    """A whole case, written and verified."""
    written = write_graphs(
        case.model, (case.images,), case.layers, case.replaced, formats, folder, **options
    )
    return [verify_graph(graph) for graph in written]


@pytest.fixture(scope="session")
def outside_case() -> Case:
    """A quantization of the layers outside the blocks as well."""
    return make_case(CHOICES["symmetric"], OUTSIDE)


@pytest.fixture(scope="session")
def outside_files(outside_case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its graphs, by format name."""
    graphs = export(outside_case, low_bit_format_names(), tmp_path_factory.mktemp("outside_files"))
    return {graph.format: graph.path for graph in graphs}


@pytest.fixture(scope="session")
def tools() -> types.SimpleNamespace:
    """Helpers for tests, which cannot import this file."""
    return types.SimpleNamespace(
        dequantized_model=dequantized_model,
        export=export,
        layer_names=layer_names,
        make_case=make_case,
        outside=OUTSIDE,
        quantize=quantize,
        quantize_rows=quantize_rows,
        run=run,
    )
