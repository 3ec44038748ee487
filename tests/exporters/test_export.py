"""What is written: the solver's codes, the model's numbers, nothing else."""

import types
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from epmq_deploy.exporters import format_names, low_bit_format_names, read_codes
from epmq_deploy.quantization.solver.grid import expand_groups

# onnxruntime and torch add up in different orders; logits here are below 20 and agree to 1e-6.
# A wrong bias, scale or code moves them by far more than this.
TOLERANCE = 1e-5


@pytest.mark.parametrize("fmt", low_bit_format_names())
def test_codes_are_the_solvers(exported, fmt: str) -> None:
    stored = read_codes(exported.graphs[fmt].path)
    assert stored.keys() == exported.case.layers.keys()
    for name, layer in exported.case.layers.items():
        assert torch.equal(stored[name].codes, layer.codes)
        assert torch.equal(stored[name].dequantize(), layer.dequantize())
        stored_zero = expand_groups(
            stored[name].zero_points, stored[name].group_size, layer.in_features
        )
        zero = expand_groups(layer.zero_points, layer.group_size, layer.in_features)
        assert torch.equal(stored_zero, zero)


@pytest.mark.parametrize("batch", [1, 5])
def test_formats_agree_bit_for_bit(exported, tools: types.SimpleNamespace, batch: int) -> None:
    images = torch.randn(batch, 3, 16, 16)
    ours = tools.run(exported.graphs["matmulnbits"].path, images)
    theirs = tools.run(exported.graphs["qdq"].path, images)
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_quantized_graph_equals_torch(exported, tools: types.SimpleNamespace, batch: int) -> None:
    images = torch.randn(batch, 3, 16, 16)
    expected = tools.dequantized_model(exported.case)(images)
    actual = tools.run(exported.graphs["matmulnbits"].path, images)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=TOLERANCE)


def test_fp32_graph_equals_the_model_given(exported, tools: types.SimpleNamespace) -> None:
    images = torch.randn(3, 3, 16, 16)
    actual = tools.run(exported.graphs["fp32"].path, images)
    for one, other in zip(actual, exported.case.model(images), strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=TOLERANCE)


def test_fp16_graph_is_the_model_given_rounded(exported, tools: types.SimpleNamespace) -> None:
    images = torch.randn(3, 3, 16, 16)
    graph = exported.graphs["fp16"]
    model = onnx.load(str(graph.path))
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type in (1, 10)]
    assert sum(tensor.data_type == 1 for tensor in floats) == 0
    assert graph.bytes < 0.6 * exported.graphs["fp32"].bytes
    for one, other in zip(tools.run(graph.path, images), exported.case.model(images), strict=True):
        difference = np.abs(one - other.numpy()).max() / np.abs(other.numpy()).max()
        assert 0 < difference < 5e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_bit_codes_in_two_bits(
    tools: types.SimpleNamespace, tmp_path: Path, symmetric: bool
) -> None:
    """All but one layer have 2 bits; that one keeps its 4."""
    case = tools.make_case(lambda name, _: (4 if name.endswith("fc2") else 2, 16, symmetric))
    for name in ("two", "four"):
        (tmp_path / name).mkdir()
    formats = ["matmulnbits", "qdq"]
    four = tools.export(case, formats, tmp_path / "four")
    two = tools.export(case, formats, tmp_path / "two", two_bit_containers=True)
    saved = sum(layer.codes.numel() // 4 for layer in case.layers.values() if layer.bits == 2)
    assert saved < four[1].bytes - two[1].bytes < 1.2 * saved
    assert four[2].bytes == two[2].bytes  # its operators have no such type
    stored = read_codes(two[1].path)
    for name, layer in case.layers.items():
        assert stored[name].bits == layer.bits
        assert torch.equal(stored[name].codes, layer.codes)
        assert torch.equal(stored[name].dequantize(), layer.dequantize())
    expected = tools.dequantized_model(case)(case.images)
    for one, other in zip(tools.run(two[1].path, case.images), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=TOLERANCE)


def test_two_bit_codes_go_into_two_bits_where_that_is_fast(
    tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    case = tools.make_case(lambda name, weight: (2, 32, False))
    for level, bits in ((0, 4), (4, 2)):
        folder = tmp_path / str(level)
        folder.mkdir()
        _, graph = tools.export(case, ["matmulnbits"], folder, accuracy_level=level)
        assert {layer.bits for layer in read_codes(graph.path).values()} == {bits}


def test_every_layer_runs_in_low_bits(exported) -> None:
    count = len(exported.case.linear)
    expected = {"fp32": 0, "fp16": 0} | dict.fromkeys(low_bit_format_names(), count)
    assert {name: graph.low_bit_nodes for name, graph in exported.graphs.items()} == expected


@pytest.mark.parametrize("fmt", format_names())
def test_interface(exported, fmt: str) -> None:
    model = onnx.load(str(exported.graphs[fmt].path))
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "pixel_values": ["batch", 3, 16, 16],
        "embedding": ["batch", 32],
        "logits_cars": ["batch", 7],
        "logits_svhn": ["batch", 4],
    }
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == (
        23 if fmt == "int8-expand" else 21
    )
    assert (model.producer_name, bool(model.producer_version)) == ("epmq-deploy", True)


@pytest.mark.parametrize("fmt", format_names())
def test_no_ballast(exported, fmt: str) -> None:
    path = exported.graphs[fmt].path
    model = onnx.load(str(path))
    operators = Counter(node.op_type for node in model.graph.node)
    assert not {"Constant", "Identity"} & operators.keys()
    # Tables are cast row by row; float16 graphs take and give float32.
    lookups = operators["Gather"] // 2 if fmt in low_bit_format_names() else 0
    converted = len(model.graph.input) + len(model.graph.output) if fmt == "fp16" else 0
    # Those of int8-expand are folded when a session is created, but for one a layer.
    expanded = 3 * len(exported.case.linear) + 1 if fmt == "int8-expand" else 0
    assert operators["Cast"] <= lookups + converted + expanded
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    # Stack traces would carry the exporting machine's paths.
    assert b".py" not in path.read_bytes()
    assert not any(node.metadata_props for node in model.graph.node)


def test_qdq_is_standard_onnx(exported) -> None:
    model = onnx.load(str(exported.graphs["qdq"].path))
    assert {entry.domain for entry in model.opset_import} == {""}


@pytest.mark.parametrize("fmt", low_bit_format_names())
def test_size_is_that_of_the_packed_layers(exported, fmt: str) -> None:
    weights = grid = 0
    for layer in read_codes(exported.graphs[fmt].path).values():
        weights += 4 * layer.codes.numel()
        blocks = layer.scales.numel()
        codes = blocks * layer.group_size * layer.bits // 8
        grid += codes + 4 * blocks + blocks
    expected = exported.graphs["fp32"].bytes - weights + grid
    # Room for names and nodes; one float32 weight left over would be 16 KiB.
    nodes = 5_000 * len(exported.case.linear) if fmt == "int8-expand" else 12_000
    assert exported.graphs[fmt].bytes < expected + nodes


def test_nothing_reaches_stdout(exported) -> None:
    assert exported.printed == ""


def test_equal_layers_keep_their_own_codes(tools: types.SimpleNamespace, tmp_path: Path) -> None:
    case = tools.make_case(lambda name, weight: (4, 32, False))
    first, *others = [name for name in case.layers if case.layers[name].codes.shape == (64, 64)]
    for name in others:
        case.layers[name] = case.layers[first]
    graphs = tools.export(case, ["qdq"], tmp_path)
    assert graphs[1].low_bit_nodes == len(case.layers)
    assert read_codes(graphs[1].path).keys() == case.layers.keys()


def test_int8_accuracy_level(tools: types.SimpleNamespace, tmp_path: Path) -> None:
    case = tools.make_case(lambda name, weight: (4, 32, True))
    _, *graphs = tools.export(case, ["matmulnbits", "qdq"], tmp_path, accuracy_level=4)
    ours, theirs = (tools.run(graph.path, case.images, accuracy_level=4) for graph in graphs)
    exact = tools.dequantized_model(case)(case.images)
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert np.array_equal(one, other)
        assert np.abs(one - reference.numpy()).max() > TOLERANCE  # it is int8 indeed


def test_callers_model_is_left_alone(tools: types.SimpleNamespace, tmp_path: Path) -> None:
    case = tools.make_case(lambda name, weight: (4, 32, True))
    backbone = case.model.backbone
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    modules = dict(case.model.named_modules())
    attention = backbone.config._attn_implementation
    case.model.train()
    tools.export(case, ["qdq"], tmp_path)
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert dict(case.model.named_modules()) == modules
    assert case.model.training
    assert backbone.config._attn_implementation == attention


def test_tensors_go_beside_the_file_when_too_large(
    tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    case = tools.make_case(lambda name, weight: (4, 32, False))
    (tmp_path / "whole").mkdir()
    (tmp_path / "beside").mkdir()
    whole = tools.export(case, low_bit_format_names(), tmp_path / "whole")
    graphs = tools.export(case, low_bit_format_names(), tmp_path / "beside", file_limit=1000)
    files = {graph.path.name for graph in graphs}
    written = {file.name for file in (tmp_path / "beside").iterdir()}
    assert written == files | {f"{name}_data" for name in files}
    for graph, other in zip(graphs, whole, strict=True):
        data = graph.path.with_name(f"{graph.path.name}_data")
        assert graph.bytes == graph.path.stat().st_size + data.stat().st_size
        assert read_codes(graph.path).keys() == read_codes(other.path).keys()
        outputs = (tools.run(made.path, case.images) for made in (graph, other))
        for one, two in zip(*outputs, strict=True):
            np.testing.assert_array_equal(one, two)
