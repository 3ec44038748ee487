"""Verification has to notice whatever is wrong with a convolution, a table or a projection."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters import low_bit_format_names
from epmq_deploy.exporters.verification.kernels import verify_codes, verify_int8_rows

CONV = "vision_model.embeddings.patch_embedding"
TABLE = "vision_model.embeddings.position_embedding"
PROJECTION = "visual_projection"


@pytest.mark.parametrize("layer", [CONV, TABLE, PROJECTION])
@pytest.mark.parametrize("part", ["codes", "scales"])
@pytest.mark.parametrize("fmt", low_bit_format_names())
def test_changed_number_is_found(
    outside_case: Any,
    outside_files: dict[str, Path],
    tmp_path: Path,
    layer: str,
    part: str,
    fmt: str,
) -> None:
    model = onnx.load(str(outside_files[fmt]))
    (tensor,) = (entry for entry in model.graph.initializer if entry.name == f"{layer}.{part}")
    array = numpy_helper.to_array(tensor).copy()
    last = array.reshape(-1)[-1]
    array.reshape(-1)[-1] = last ^ 1 if part == "codes" else np.nextafter(last, np.float32(9))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(NumericsError, match=f"{layer}: {part} differ$"):
        verify_codes(_save(model, tmp_path), outside_case.layers)


@pytest.mark.parametrize("layer", [CONV, TABLE, PROJECTION])
@pytest.mark.parametrize("fmt", low_bit_format_names())
def test_missing_and_unexpected_are_found(
    outside_case: Any, outside_files: dict[str, Path], layer: str, fmt: str
) -> None:
    layers = dict(outside_case.layers)
    layers["vision_model.another"] = layers.pop(layer)
    with pytest.raises(NumericsError) as error:
        verify_codes(outside_files[fmt], layers)
    assert f"{layer}: was never quantized" in str(error.value)
    assert "vision_model.another: not in the file" in str(error.value)


def test_float_weight_beside_the_codes_is_found(
    outside_case: Any, outside_files: dict[str, Path], tmp_path: Path
) -> None:
    rows = {name: outside_case.layers[name] for name in (CONV, TABLE)}
    verify_int8_rows(outside_files["qdq"], rows)
    model = onnx.load(str(outside_files["qdq"]))
    weight = rows[CONV].dequantize().reshape(64, 3, 8, 8).numpy()
    model.graph.initializer.append(numpy_helper.from_array(weight, "folded"))
    with pytest.raises(NumericsError, match=f"{CONV}: folded is its weight in float$"):
        verify_int8_rows(_save(model, tmp_path), rows)


@pytest.mark.parametrize("layer", [CONV, TABLE])
def test_codes_in_float_are_found(
    outside_case: Any, outside_files: dict[str, Path], tmp_path: Path, layer: str
) -> None:
    rows = {name: outside_case.layers[name] for name in (CONV, TABLE)}
    model = onnx.load(str(outside_files["qdq"]))
    (tensor,) = (entry for entry in model.graph.initializer if entry.name == f"{layer}.codes")
    array = numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path = _save(model, tmp_path)
    with pytest.raises(NumericsError, match=f"{layer}: codes are no INT8 tensor$"):
        verify_int8_rows(path, rows)
    with pytest.raises(NumericsError, match=f"{layer}: not in the file"):
        verify_codes(path, outside_case.layers)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda model: _set(model, "DequantizeLinear", axis=1), f"{CONV}: not in the file"),
        (lambda model: _shift(model), f"{CONV}: zero_points differ"),
        (lambda model: _set(model, "Gather", axis=1), f"{TABLE}: not in the file"),
    ],
)
def test_other_arithmetic_is_found(
    outside_case: Any,
    outside_files: dict[str, Path],
    tmp_path: Path,
    spoil: Callable[[onnx.ModelProto], None],
    problem: str,
) -> None:
    model = onnx.load(str(outside_files["matmulnbits"]))
    spoil(model)
    with pytest.raises(NumericsError, match=problem):
        verify_codes(_save(model, tmp_path), outside_case.layers)


def _set(model: onnx.ModelProto, op_type: str, axis: int) -> None:
    node = next(
        node
        for node in model.graph.node
        if node.op_type == op_type and node.input[0] in (f"{CONV}.codes", f"{TABLE}.codes")
    )
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", axis))


def _shift(model: onnx.ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    zeros = np.ones(64, np.int8)
    model.graph.initializer.append(numpy_helper.from_array(zeros, "shift"))
    node.input.append("shift")


def _save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "tampered.onnx"
    onnx.save(model, str(path))
    return path
