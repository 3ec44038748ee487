"""Layers of low-bit graphs against fp32 merged, in graphs made by hand and exported ones."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save

from epmq_deploy.errors import MismatchError
from epmq_deploy.runtime.diagnosis import diagnose

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
