"""Sessions and latency."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.runtime.latency import measure_latency
from epmq_deploy.runtime.sessions import Graph


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """A graph with ``y = x + x`` and ``z = x * x``."""
    floats = [("x", TensorProto.FLOAT, ["batch", 2])]
    outputs = [("y", TensorProto.FLOAT, ["batch", 2]), ("z", TensorProto.FLOAT, ["batch", 2])]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Mul", ["x", "x"], ["z"])],
        "doubling",
        [helper.make_tensor_value_info(*item) for item in floats],
        [helper.make_tensor_value_info(*item) for item in outputs],
    )
    opset = [helper.make_opsetid("", 21)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_runs_the_outputs_asked_for(doubling: Path) -> None:
    graph = Graph(doubling, provider="cpu", threads=1)
    inputs = [torch.tensor([[1.0, 3.0]])]
    assert graph.provider == "CPUExecutionProvider"
    assert set(graph.run(inputs)) == {"y", "z"}
    found = graph.run(inputs, ["z"])
    assert set(found) == {"z"}
    assert np.array_equal(found["z"], [[1.0, 9.0]])


def test_a_provider_that_is_not_used_is_an_error(doubling: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(RecipeError, match="CUDAExecutionProvider was asked for"):
        Graph(doubling, provider="cuda")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(NumericsError, match=r"broken\.onnx"):
        Graph(tmp_path / "broken.onnx")


def test_latency_takes_turns_and_ignores_warmup(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    graphs = {name: Graph(doubling, provider="cpu", threads=1) for name in ("a", "b")}
    for name, graph in graphs.items():
        monkeypatch.setattr(graph, "run", lambda inputs, name=name: order.append(name))
    found = measure_latency(graphs, [torch.zeros(1, 2)], runs=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert set(found) == {"a", "b"}
    assert all(0 <= item.p50_ms <= item.p95_ms for item in found.values())
