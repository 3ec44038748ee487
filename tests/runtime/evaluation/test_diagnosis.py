"""Layers of low-bit graphs against fp32 merged, in graphs made by hand and exported ones."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save

from epmq_deploy.errors import MismatchError
from epmq_deploy.exporters.lowering.int8.matmul import Emitter, multiply, quantize_input
from epmq_deploy.exporters.lowering.int8.smoothing import divide_input
from epmq_deploy.runtime.evaluation.diagnosis import _Ratio, diagnose

WIDTH, LAYERS = 16, ("stack.0.fc", "stack.1.fc", "stack.2.fc")
SAMPLES = [(torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(i)),) for i in range(8)]
SESSION = {"provider": "cpu", "threads": 1}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in LAYERS}


def write(file: Path, layers: dict[str, np.ndarray], *, low_bit: bool) -> Path:
    """``Relu(x W + b)`` for each layer; low-bit graphs hold codes as well."""
    nodes, initializers, value = [], [], "x"
    for name, weight in layers.items():
        bias = np.full(WIDTH, 0.1, np.float32)
        initializers += [
            numpy_helper.from_array(bias, f"{name}.bias"),
            numpy_helper.from_array(weight, f"{name}.codes" if low_bit else f"{name}.weight"),
        ]
        nodes += [
            helper.make_node(
                "MatMul", [value, initializers[-1].name], [f"{name}.product"], name=name
            ),
            helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [f"{name}.sum"]),
            helper.make_node("Relu", [f"{name}.sum"], [f"{name}.out"]),
        ]
        value = f"{name}.out"
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", WIDTH])],
        initializers,
    )
    opset = [helper.make_opsetid("", 21)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), file)
    return file


@pytest.fixture
def fp32(tmp_path: Path) -> Path:
    return write(tmp_path / "fp32.onnx", weights(), low_bit=False)


def test_noise_is_found_where_it_was_put(fp32: Path, tmp_path: Path) -> None:
    """White noise of a hundredth of the weights' power is 20 dB, in its own layer alone."""
    changed = weights()
    noise = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    changed["stack.1.fc"] += 0.1 * noise
    file = write(tmp_path / "low.onnx", changed, low_bit=True)
    found = diagnose(fp32, {"low": file}, {"low": {}}, SAMPLES, **SESSION)["low"]
    noises = {item.layer: item for item in found.layers}
    assert tuple(noises) == LAYERS
    assert found.samples == len(SAMPLES)
    assert noises["stack.0.fc"].own_db == noises["stack.0.fc"].output_db > 100
    assert noises["stack.1.fc"].own_db == pytest.approx(20, abs=1.5)
    assert noises["stack.1.fc"].output_db == pytest.approx(noises["stack.1.fc"].own_db, abs=0.01)
    # The last layer adds nothing of its own, but receives what came before.
    assert noises["stack.2.fc"].own_db > 100
    assert noises["stack.2.fc"].output_db < 25
    assert found.worst_first[0].layer == "stack.1.fc"
    assert found.blamed == ("stack.1.fc",)


def in_int8(file: Path, name: str, factors: np.ndarray) -> Path:
    """A graph with one layer in int8, smoothed by a multiplication in front of it."""
    model = ir.load(file)
    node = next(node for node in model.graph if node.name == name)
    divide_input(model.graph, {node: torch.from_numpy(factors)})
    emit = Emitter(model.graph, name)
    weight = weights()[name] * factors[:, None]
    steps = np.abs(weight).max(axis=0) / 127
    codes = emit.tensor("int8", np.rint(weight / steps).astype(np.int8))
    emit.tensor("smoothing", (4 * factors).astype(np.int8))
    emit.tensor("smoothing_unit", np.array(0.25, np.float32))
    scales = emit.tensor("channel_scales", steps)
    product = multiply(emit, quantize_input(emit, node.inputs[0], None), codes, scales)
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], emit.nodes, node.outputs, [product]
    )
    ir.save(model, file)
    return file


@pytest.mark.parametrize("name", LAYERS[1:])
def test_a_smoothed_layer_is_compared_on_what_it_was_meant_to_read(
    fp32: Path, tmp_path: Path, name: str
) -> None:
    factors = np.array([0.25, 4.0] * (WIDTH // 2), np.float32)
    file = in_int8(write(tmp_path / "low.onnx", weights(), low_bit=True), name, factors)
    found = diagnose(fp32, {"low": file}, {"low": {}}, SAMPLES, **SESSION)["low"]
    own = {noise.layer: noise.own_db for noise in found.layers}
    assert own[name] > 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_noise(value: float) -> None:
    ratio = _Ratio()
    ratio.add(np.full((2, 3), value, np.float32), np.ones((2, 3), np.float32))
    assert ratio.decibels == -150


def test_equal_layers_are_not_blamed(fp32: Path, tmp_path: Path) -> None:
    same = write(tmp_path / "low.onnx", weights(), low_bit=True)
    found = diagnose(fp32, {"low": same}, {"low": {}}, SAMPLES, **SESSION)["low"]
    assert {item.own_db for item in found.layers} == {150.0}
    assert set(found.blamed) == set()


def test_graphs_without_common_layers_are_refused(fp32: Path, tmp_path: Path) -> None:
    other = {f"other.{name}": weight for name, weight in weights().items()}
    file = write(tmp_path / "low.onnx", other, low_bit=True)
    with pytest.raises(MismatchError, match=r"low\.onnx: no layer is named as in .*fp32\.onnx"):
        diagnose(fp32, {"low": file}, {"low": {}}, SAMPLES, **SESSION)


def test_the_graph_on_disk_stays_as_it_is(fp32: Path, tmp_path: Path) -> None:
    before = fp32.read_bytes()
    file = write(tmp_path / "low.onnx", weights(), low_bit=True)
    diagnose(fp32, {"low": file}, {"low": {}}, SAMPLES, **SESSION)
    assert fp32.read_bytes() == before
    assert len(onnxruntime.InferenceSession(fp32).get_outputs()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"fp32.onnx", "low.onnx"}
