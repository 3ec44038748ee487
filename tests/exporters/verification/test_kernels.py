"""Verification has to fail when a file is not what it should be."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from epmq_deploy.errors import MismatchError, NumericsError
from epmq_deploy.exporters import read_codes
from epmq_deploy.exporters.verification.kernels import verify_codes, verify_runs_low_bit

LAYER = "vision_model.encoder.layers.1.mlp.fc2"


def _load(exported, fmt: str) -> onnx.ModelProto:
    return onnx.load(str(exported.graphs[fmt].path))


def _save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "tampered.onnx"
    onnx.save(model, str(path))
    return path


def test_layer_that_is_not_fused_is_found(exported, tmp_path: Path) -> None:
    model = _load(exported, "qdq")
    # The dequantized weight takes a detour onnxruntime does not look through.
    (multiply,) = (node for node in model.graph.node if node.name == LAYER)
    position = list(model.graph.node).index(multiply)
    detour = helper.make_node("Relu", [multiply.input[1]], ["detour"])
    multiply.input[1] = "detour"
    model.graph.node.insert(position, detour)
    with pytest.raises(NumericsError, match=rf"in low bits: {LAYER}$"):
        verify_runs_low_bit(_save(model, tmp_path), exported.case.linear, 0)


def test_other_accuracy_level_is_found(exported) -> None:
    path = exported.graphs["matmulnbits"].path
    with pytest.raises(NumericsError, match=f"accuracy level 4.*{LAYER}"):
        verify_runs_low_bit(path, exported.case.linear, 4)


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_changed_number_is_found(exported, tmp_path: Path, part: str) -> None:
    model = _load(exported, "matmulnbits")
    (tensor,) = (t for t in model.graph.initializer if t.name == f"{LAYER}.{part}")
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = array.reshape(-1)[0] ^ 1 if part == "codes" else np.float32(0.5)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(NumericsError, match=f"{LAYER}: {part} differ"):
        verify_codes(_save(model, tmp_path), exported.case.layers)


@pytest.mark.parametrize("fmt", ["matmulnbits", "qdq"])
def test_missing_and_extra_layers_are_found(exported, fmt: str) -> None:
    path = exported.graphs[fmt].path
    layers = dict(exported.case.layers)
    layers["vision_model.another"] = layers.pop(LAYER)
    with pytest.raises(NumericsError) as error:
        verify_codes(path, layers)
    assert f"{LAYER}: was never quantized" in str(error.value)
    assert "vision_model.another: not in the file" in str(error.value)


def test_changed_zero_points_are_found(exported) -> None:
    layers = dict(exported.case.layers)
    shifted = layers[LAYER].zero_points.clone()
    shifted[0, 0] ^= 1
    layers[LAYER] = dataclasses.replace(layers[LAYER], zero_points=shifted)
    with pytest.raises(NumericsError, match=f"{LAYER}: zero_points differ"):
        verify_codes(exported.graphs["qdq"].path, layers)


def test_broken_file(exported, tmp_path: Path) -> None:
    model = _load(exported, "matmulnbits")
    model.graph.node.pop()
    with pytest.raises(NumericsError, match=r"tampered\.onnx is not a valid ONNX model"):
        verify_runs_low_bit(_save(model, tmp_path), exported.case.linear, 0)


def test_fp32_graph_holds_no_codes(exported, tmp_path: Path) -> None:
    model = _load(exported, "fp32")
    del model.metadata_props[:]
    with pytest.raises(MismatchError, match="not exported by epmq"):
        read_codes(_save(model, tmp_path))
