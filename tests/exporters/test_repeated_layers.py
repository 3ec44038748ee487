"""Layers that run several times: one layer, one set of codes, a node a run."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters import low_bit_format_names
from epmq_deploy.exporters.lowering.layers import layer_of, run_name
from epmq_deploy.exporters.verification.codes import read_codes
from epmq_deploy.exporters.verification.kernels import verify_runs_low_bit

FIRST = "vision_model.encoder.layers.0."


def with_one_block_twice(tools: types.SimpleNamespace) -> Any:
    """The tiny model whose second block is the first one again."""
    case = tools.make_case(lambda name, weight: (4, 32, False))
    encoder = case.model.backbone.get_submodule("vision_model.encoder.layers")
    encoder[1] = encoder[0]
    layers = {name: layer for name, layer in case.layers.items() if name.startswith(FIRST)}
    return dataclasses.replace(case, layers=layers, replaced={})


@pytest.fixture(scope="module")
def case(tools: types.SimpleNamespace) -> Any:
    return with_one_block_twice(tools)


@pytest.fixture(scope="module")
def graphs(
    case: Any, tools: types.SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Written and verified: codes of every run are the layer's, and all run as low-bit kernels."""
    written = tools.export(case, list(low_bit_format_names()), tmp_path_factory.mktemp("twice"))
    return {graph.format: graph for graph in written}


@pytest.mark.parametrize("name", low_bit_format_names())
def test_every_run_is_a_node_with_the_layer_s_codes(
    case: Any, graphs: dict[str, Any], name: str
) -> None:
    nodes = {node.name for node in onnx.load(graphs[name].path).graph.node}
    assert {run_name(layer, run) for layer in case.layers for run in (1, 2)} <= nodes
    assert graphs[name].low_bit_nodes == 2 * len(case.layers)
    assert read_codes(graphs[name].path).keys() == case.layers.keys()


@pytest.mark.parametrize("name", ["matmulnbits", "qdq"])
def test_the_graph_computes_what_torch_does(
    case: Any, graphs: dict[str, Any], tools: types.SimpleNamespace, name: str
) -> None:
    model = case.model
    for layer, quantized in case.layers.items():
        linear = model.backbone.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = quantized.dequantize()
    with torch.inference_mode():
        expected = model(case.images)
    for actual, value in zip(tools.run(graphs[name].path, case.images), expected, strict=True):
        assert np.allclose(actual, value, atol=1e-4)


def test_matmulnbits_holds_codes_once(case: Any, graphs: dict[str, Any]) -> None:
    stored = [tensor.name for tensor in onnx.load(graphs["matmulnbits"].path).graph.initializer]
    assert sorted(name for name in stored if name.endswith(".codes")) == sorted(
        f"{layer}.codes" for layer in case.layers
    )
    assert not [name for name in stored if "#" in name]


def test_a_run_that_is_missing_is_named(case: Any, graphs: dict[str, Any]) -> None:
    third = run_name(f"{FIRST}mlp.fc1", 3)
    runs = [run_name(layer, run) for layer in case.layers for run in (1, 2)]
    path: Path = graphs["matmulnbits"].path
    verify_runs_low_bit(path, case.layers, 0, runs=runs)
    with pytest.raises(NumericsError, match=rf"not run these layers in low bits: {third}"):
        verify_runs_low_bit(path, case.layers, 0, runs=[*runs, third])


def test_names_of_runs_name_the_layer() -> None:
    assert run_name("block.0.keys", 1) == "block.0.keys"
    assert [layer_of(run_name("block.0.keys", run)) for run in (1, 2, 12)] == ["block.0.keys"] * 3
