"""Convolutions and embedding tables: INT8 in the file, the solver's numbers when they run."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from tiny_text import TinyText
from torch import Tensor, nn

from epmq_deploy.errors import MismatchError
from epmq_deploy.exporters import low_bit_format_names, read_codes, session_config, write_graphs
from epmq_deploy.models import MultiTaskModel, TaskHead
from epmq_deploy.models.base import ModelFamily
from epmq_deploy.models.encoders.bert import FAMILY as BERT
from epmq_deploy.models.encoders.clip import ClipFamily
from epmq_deploy.recipe import OPSETS

CONV = "vision_model.embeddings.patch_embedding"
TABLE = "vision_model.embeddings.position_embedding"
PROJECTION = "visual_projection"
TABLES = (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
)
# int8-expand makes integer products of patch embeddings.
CONVOLVING = [name for name in low_bit_format_names() if name != "int8-expand"]
# See test_export.
TOLERANCE = 1e-5


@pytest.mark.parametrize("fmt", CONVOLVING)
def test_standard_operators_over_int8(outside_files: dict[str, Path], fmt: str) -> None:
    model = onnx.load(str(outside_files[fmt]))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert tensors[f"{CONV}.codes"].data_type == onnx.TensorProto.INT8
    assert tensors[f"{TABLE}.codes"].data_type == onnx.TensorProto.INT8
    assert list(tensors[f"{CONV}.codes"].dims) == [64, 3, 8, 8]
    nodes = {node.name: node for node in model.graph.node}
    made_by = {output: node for node in model.graph.node for output in node.output}
    convolution, multiply = nodes[CONV], nodes[TABLE]
    dequantize = made_by[convolution.input[1]]
    assert (convolution.op_type, dequantize.op_type) == ("Conv", "DequantizeLinear")
    assert list(dequantize.input) == [f"{CONV}.codes", f"{CONV}.scales"]
    assert multiply.op_type == "Mul"
    assert made_by[multiply.input[0]].op_type == "Cast"
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    assert not [entry for entry in model.opset_import if entry.domain == "epmq_deploy"]


@pytest.mark.parametrize("fmt", low_bit_format_names())
def test_no_float_weight_is_left(outside_files: dict[str, Path], fmt: str) -> None:
    model = onnx.load(str(outside_files[fmt]))
    floats = {
        tuple(tensor.dims)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    assert not floats & {(64, 3, 8, 8), (64, 192), (5, 64), (1, 5, 64), (64, 32), (32, 64)}


@pytest.mark.parametrize("fmt", CONVOLVING)
def test_convolution_gets_the_dequantized_weight(
    outside_case: Any,
    outside_files: dict[str, Path],
    tools: types.SimpleNamespace,
    tmp_path: Path,
    fmt: str,
) -> None:
    """Bit for bit."""
    model = onnx.load(str(outside_files[fmt]))
    model.graph.output.append(helper.make_empty_tensor_value_info(f"{CONV}.weight"))
    onnx.save(model, str(tmp_path / "weight.onnx"))
    weight = tools.run(tmp_path / "weight.onnx", outside_case.images)[-1]
    expected = outside_case.layers[CONV].dequantize().reshape(64, 3, 8, 8)
    assert np.array_equal(weight, expected.numpy())


def test_newest_opset(outside_case: Any, tools: types.SimpleNamespace, tmp_path: Path) -> None:
    _, graph = tools.export(outside_case, ["matmulnbits"], tmp_path, opset=OPSETS[-1])
    expected = tools.dequantized_model(outside_case)(outside_case.images)
    for one, other in zip(tools.run(graph.path, outside_case.images), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=TOLERANCE)


def test_parity_breaks_without_them(
    outside_case: Any, outside_files: dict[str, Path], tools: types.SimpleNamespace
) -> None:
    """The tolerance tells 8 bits from float, so that the parity tests are not vacuous."""
    for name in tools.outside:
        layers = {key: layer for key, layer in outside_case.layers.items() if key != name}
        other = tools.dequantized_model(dataclasses.replace(outside_case, layers=layers))(
            outside_case.images
        )[0]
        ours = tools.run(outside_files["qdq"], outside_case.images)[0]
        assert np.abs(ours - other.numpy()).max() > TOLERANCE


def test_equal_tables_keep_their_own_codes(
    outside_case: Any, tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    """A table whose numbers another layer has as well is still read back under its name."""
    model = tools.make_case(lambda name, weight: (4, 32, True)).model
    twin = nn.Embedding(5, 64)
    twin.weight.data.copy_(model.backbone.get_submodule(TABLE).weight)
    embeddings = model.backbone.get_submodule("vision_model.embeddings")
    embeddings.position_embedding = _Sum(embeddings.position_embedding, twin)
    names = [f"{TABLE}.first", f"{TABLE}.second"]
    layers = dict.fromkeys(names, tools.quantize_rows(twin.weight.detach()))
    both = dataclasses.replace(outside_case, model=model, layers=layers, replaced={})
    for graph in tools.export(both, low_bit_format_names(), tmp_path)[1:]:
        assert set(read_codes(graph.path)) == set(names)


class _Sum(nn.Module):
    """Two tables for the same ids."""

    def __init__(self, first: nn.Embedding, second: nn.Embedding) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> Tensor:
        return self.first(ids) + self.second(ids)


class _Twice(nn.Module):
    """One table for two sets of ids."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.table(ids.flip(1))


class _WholeTable(nn.Module):
    """A model that reads a table's weight instead of calling it."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        assert self.table.weight.dtype == torch.float32
        return self.table.weight[None] * 1.5


def test_table_that_is_never_looked_up(
    outside_case: Any, tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    model = tools.make_case(lambda name, weight: (4, 32, True)).model
    embeddings = model.backbone.get_submodule("vision_model.embeddings")
    table = embeddings.position_embedding
    embeddings.position_embedding = _WholeTable(table)
    name = f"{TABLE}.table"
    layer = tools.quantize_rows(table.weight)
    changed = dataclasses.replace(outside_case, model=model, layers={name: layer}, replaced={})
    graphs = tools.export(changed, low_bit_format_names(), tmp_path)[1:]
    table.weight.copy_(layer.dequantize())
    expected = model(outside_case.images)
    for graph in graphs:
        assert torch.equal(read_codes(graph.path)[name].codes, layer.codes)
        for one, other in zip(tools.run(graph.path, outside_case.images), expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=TOLERANCE)


class _RawProjection(ClipFamily):
    """The projection's product is the graph's output."""

    def embed(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        features: Tensor = model(pixel_values=inputs[0]).image_embeds
        return features


def test_output_of_the_graph_keeps_its_name(
    outside_case: Any, tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    raw = MultiTaskModel(_RawProjection(), outside_case.model.backbone, {}).eval()
    changed = dataclasses.replace(outside_case, model=raw)
    for graph in tools.export(changed, low_bit_format_names(), tmp_path)[1:]:
        assert [value.name for value in onnx.load(str(graph.path)).graph.output] == ["embedding"]
        assert graph.low_bit_nodes == len(outside_case.linear)


@pytest.fixture(scope="module")
def text(tiny_text: TinyText, tools: types.SimpleNamespace, tmp_path_factory: Any) -> Any:
    """A tiny BERT with all its tables in 8 bits: the torch model and the files."""
    backbone = BERT.load(tiny_text.base)
    layers = {name: tools.quantize_rows(backbone.get_submodule(name).weight) for name in TABLES}
    folder = tmp_path_factory.mktemp("text")
    model = MultiTaskModel(BERT, backbone, {"topic": TaskHead(torch.randn(3, 32))}).eval()
    example = BERT.example_inputs(tiny_text.base, 2)
    with torch.no_grad():
        graphs = write_graphs(model, example, layers, {}, low_bit_format_names(), folder)
        for name, layer in layers.items():
            backbone.get_submodule(name).weight.copy_(layer.dequantize())
    return types.SimpleNamespace(model=model, layers=layers, graphs=graphs[1:])


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 9), (2, 24)])
def test_tables_of_a_text_model(text: Any, batch: int, length: int) -> None:
    ids = torch.randint(0, 15, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, (length + 1) // 2 :] = 0
    inputs = ids, mask, torch.randint(0, 2, (batch, length))
    with torch.inference_mode():
        expected = text.model(*inputs)
    outputs = [_run_text(graph.path, BERT, inputs) for graph in text.graphs]
    for one, *others, reference in zip(*outputs, expected, strict=True):
        assert all(np.array_equal(one, other) for other in others)
        np.testing.assert_allclose(one, reference.numpy(), rtol=0, atol=TOLERANCE)


def test_looked_up_rows_are_the_dequantized_ones(text: Any, tmp_path: Path) -> None:
    """Bit for bit, before anything else is computed with them."""
    ids = torch.randint(0, 15, (2, 7))
    inputs = ids, torch.ones_like(ids), torch.zeros_like(ids)
    for graph in text.graphs:
        model = onnx.load(str(graph.path))
        (node,) = (node for node in model.graph.node if node.name == TABLES[0])
        model.graph.output.append(helper.make_empty_tensor_value_info(node.output[0]))
        path = tmp_path / graph.path.name
        onnx.save(model, str(path))
        rows = _run_text(path, BERT, inputs)[-1]
        assert np.array_equal(rows, text.layers[TABLES[0]].dequantize()[ids].numpy())


def _run_text(path: Path, family: ModelFamily, inputs: tuple[Tensor, ...]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in session_config(0).items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = zip(family.input_names, inputs, strict=True)
    return list(session.run(None, {name: tensor.numpy() for name, tensor in feeds}))


@pytest.mark.parametrize(
    ("layer", "change", "problem"),
    [
        (CONV, {"bits": 4}, "8 bits and zero point 128"),
        (CONV, {"group_size": 96}, "group size 96 of 192 columns"),
        (TABLE, {"zero_points": torch.full((5, 1), 127, dtype=torch.uint8)}, "zero point 128"),
        (TABLE, {"codes": torch.zeros(4, 64, dtype=torch.uint8)}, "its weight is [5, 64]"),
        (TABLE, {"scales": torch.ones(5, 2)}, "scales are [5, 2], not [5, 1]"),
    ],
)
def test_what_cannot_be_stored(
    outside_case: Any,
    tools: types.SimpleNamespace,
    tmp_path: Path,
    layer: str,
    change: dict[str, Any],
    problem: str,
) -> None:
    layers = outside_case.layers | {
        layer: dataclasses.replace(outside_case.layers[layer], **change)
    }
    with pytest.raises(MismatchError) as error:
        tools.export(dataclasses.replace(outside_case, layers=layers), ["qdq"], tmp_path)
    assert any(
        line.startswith(f"layer {layer}: ") and problem in line for line in error.value.problems
    )
    assert not list(tmp_path.iterdir())


def test_modules_that_do_more_are_refused(
    outside_case: Any, tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    model = tools.make_case(lambda name, weight: (4, 32, True)).model
    model.backbone.get_submodule(CONV).padding_mode = "reflect"
    model.backbone.get_submodule(TABLE).max_norm = 1.0
    with pytest.raises(MismatchError) as error:
        tools.export(dataclasses.replace(outside_case, model=model), ["qdq"], tmp_path)
    text = str(error.value)
    assert f"layer {CONV}: convolution with padding mode reflect" in text
    assert f"layer {TABLE}: embedding with max_norm" in text


def test_table_that_is_used_twice_is_refused(
    outside_case: Any, tools: types.SimpleNamespace, tmp_path: Path
) -> None:
    model = tools.make_case(lambda name, weight: (4, 32, True)).model
    embeddings = model.backbone.get_submodule("vision_model.embeddings")
    embeddings.position_embedding = _Twice(embeddings.position_embedding)
    layers = {f"{TABLE}.table": outside_case.layers[TABLE]}
    again = dataclasses.replace(outside_case, model=model, layers=layers, replaced={})
    with pytest.raises(MismatchError, match=rf"layer {TABLE}\.table runs 2 times"):
        tools.export(again, ["qdq"], tmp_path)


def test_stand_ins_are_not_run(outside_case: Any) -> None:
    from epmq_deploy.exporters.lowering.int8.modules import Int8Embedding

    stand_in = Int8Embedding(TABLE, outside_case.layers[TABLE], nn.Embedding(5, 64))
    with pytest.raises(RuntimeError, match=TABLE):
        stand_in(torch.zeros(1, dtype=torch.int64))
