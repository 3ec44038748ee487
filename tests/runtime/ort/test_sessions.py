"""Sessions, providers, latency and memory."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save

from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.models.text_generation.special_tokens import SpecialTokens
from epmq_deploy.runtime.evaluation.latency import measure_latency
from epmq_deploy.runtime.evaluation.significance import Interval, median_interval
from epmq_deploy.runtime.ort import generation, sessions
from epmq_deploy.runtime.ort.footprint import measure_footprint
from epmq_deploy.runtime.ort.providers import check_used, provider_named
from epmq_deploy.runtime.ort.sessions import Graph


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


@pytest.mark.parametrize(("given", "used"), [(None, 3), (1, 1)])
def test_threads_are_as_many_as_cores_may_be_used_unless_given(
    doubling: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, used: int
) -> None:
    monkeypatch.setattr(sessions, "usable_cores", lambda: 3)
    graph = Graph(doubling, provider="cpu", threads=given)
    assert graph._session.get_session_options().intra_op_num_threads == used


@pytest.mark.parametrize("name", ["CUDA", "Tensorrt"])
def test_a_provider_that_is_not_used_is_an_error(
    doubling: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    if f"{name}ExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {name}")
    with pytest.raises(RecipeError, match=f"{name}ExecutionProvider could not be started"):
        Graph(doubling, provider=name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider", "auto"])
def test_providers_have_short_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provider_named(name) == "CPUExecutionProvider"


def test_auto_takes_cuda_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert provider_named("auto") == "CUDAExecutionProvider"


def test_a_provider_that_is_not_installed_is_named_with_those_that_are() -> None:
    with pytest.raises(
        RecipeError, match=r"provider 'npu' is not in this onnxruntime; it has .*cpu"
    ):
        provider_named("npu")


class FakeSession:
    """A session whose provider left some nodes to the CPU."""

    def __init__(self, *elsewhere: str) -> None:
        nodes = [SimpleNamespace(op_type=kind) for kind in elsewhere]
        self.parts = [
            SimpleNamespace(ep_name="X", get_nodes=lambda: [SimpleNamespace(op_type="MatMul")]),
            SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes),
        ]

    def get_providers(self) -> list[str]:
        return ["X", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return self.parts


def test_multiplications_left_to_the_cpu_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"m\.onnx: provider X leaves 1 Conv, 2 MatMulNBits to"):
        check_used(FakeSession("MatMulNBits", "Conv", "MatMulNBits"), "m.onnx", "X", strict=True)
    assert check_used(FakeSession("Shape", "Gather"), "m.onnx", "X", strict=True) == "X"


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(NumericsError, match=r"broken\.onnx"):
        Graph(tmp_path / "broken.onnx")


def test_latency_takes_turns_and_ignores_warmup(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) ** 3 / 1000)
    graphs = {name: Graph(doubling, provider="cpu", threads=1) for name in ("a", "b")}
    for name, graph in graphs.items():
        monkeypatch.setattr(graph, "run", lambda inputs, name=name: order.append(name))
    found = measure_latency(graphs, "a", [torch.zeros(4, 2)], None, runs=3, warmup=2)
    # Who begins changes with every turn.
    assert "".join(order) == "abbaabbaab"
    # The n-th run takes 12n^2 + 6n + 1 ms; the first two turns do not count.
    times = {"a": (217, 631, 817), "b": (331, 469, 1027)}
    for name, values in times.items():
        timing = found[name]
        assert timing.p50_ms == pytest.approx(sorted(values)[1])
        assert timing.p50_ms <= timing.p95_ms <= timing.p99_ms <= max(values)
        assert timing.throughput == pytest.approx(4000 / sorted(values)[1])
        assert (timing.batch, timing.threads) == (4, None)
    assert found["a"].ratio == 1
    # The median of 331/217, 469/631 and 1027/817.
    assert found["b"].ratio == pytest.approx(1027 / 817)


@pytest.mark.parametrize(
    # Conover (1999), table A3, at p = 0.5; the last from the normal approximation.
    ("count", "low", "high"),
    [(4, 1, 4), (5, 1, 5), (6, 1, 6), (10, 2, 9), (20, 6, 15), (50, 18, 33), (3000, 1446, 1555)],
)
def test_interval_of_a_median(count: int, low: int, high: int) -> None:
    shuffled = [float((7 * index) % count + 1) for index in range(count)]
    assert median_interval(shuffled) == Interval(low, high)


def test_few_runs_tell_nothing() -> None:
    assert median_interval([1.0, 1.0, 1.0]) is None


def test_ratios_are_of_runs_in_the_same_turn(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that slows down all the time leaves the interval as narrow as it is."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    graphs = {name: Graph(doubling, provider="cpu", threads=1) for name in ("a", "b")}
    turns = {"a": 0, "b": 0}

    def work(name: str, cost: float) -> None:
        turns[name] += 1
        now[0] += cost * 2.0 ** turns[name]

    for name, cost in (("a", 1.0), ("b", 0.5)):
        run = partial(work, name, cost)
        monkeypatch.setattr(graphs[name], "run", lambda inputs, run=run: run())
    found = measure_latency(graphs, "a", [torch.zeros(1, 2)], None, runs=8, warmup=0)
    assert found["b"].ratio_interval == Interval(pytest.approx(0.5), pytest.approx(0.5))
    assert found["a"].ratio_interval == Interval(1.0, 1.0)
    # The ratio is what the interval is of.
    assert found["b"].ratio == pytest.approx(0.5)


def test_footprint_is_measured_in_a_process_of_its_own(doubling: Path, tmp_path: Path) -> None:
    """The bigger graph needs more memory, whatever this process holds."""
    big = tmp_path / "big.onnx"
    weight = numpy_helper.from_array(np.ones((2, 4_000_000), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4_000_000])],
        [weight],
    )
    opset = [helper.make_opsetid("", 21)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), big)
    inputs = [np.ones((1, 2), np.float32)]
    settings = {"provider": "CPUExecutionProvider", "threads": 1, "session_config": {}}
    small, large = (measure_footprint([file], inputs, **settings) for file in (doubling, big))
    assert small.load_ms > 0
    if small.peak_bytes is None or large.peak_bytes is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert large.peak_bytes - small.peak_bytes > 30_000_000
    assert small.peak_bytes < 30_000_000
    together = measure_footprint([doubling, big], inputs, **settings)
    assert together.peak_bytes is not None
    assert together.peak_bytes > small.peak_bytes + 10_000_000


def test_memory_is_that_of_writing_not_of_loading(tmp_path: Path) -> None:
    """Every token that is written leaves a key of 4 MB behind."""
    width = 1_000_000
    past = ["batch", 1, "past", width]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["floats", "last"], ["logits"]),
            helper.make_node("Unsqueeze", ["logits", "first"], ["heads"]),
            helper.make_node("Expand", ["heads", "wide"], ["key"]),
            helper.make_node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        ],
        "writer",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, past),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 1]),
            helper.make_tensor_value_info(
                "present.0.key", TensorProto.FLOAT, ["batch", 1, "longer", width]
            ),
        ],
        [
            numpy_helper.from_array(np.array([2]), "last"),
            numpy_helper.from_array(np.array([1]), "first"),
            numpy_helper.from_array(np.array([1, 1, 1, width]), "wide"),
        ],
    )
    opset = [helper.make_opsetid("", 21)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "w.onnx")
    ids = np.zeros((1, 2), np.int64)
    brief, long = (
        measure_footprint(
            [tmp_path / "w.onnx"],
            [ids, np.ones_like(ids), np.array(length)],
            provider="CPUExecutionProvider",
            threads=1,
            session_config={},
            special_tokens=SpecialTokens(None, (9,), 0),
        )
        for length in (1, 11)
    )
    if brief.peak_bytes is None or long.peak_bytes is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert long.peak_bytes - brief.peak_bytes > 10 * 4 * width


def test_what_writes_texts_needs_nothing_but_numpy() -> None:
    """Else the process that measures memory would hold more than a graph's user does."""
    file = generation.__file__
    code = f"import runpy, sys; runpy.run_path({file!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"torch", "transformers", "epmq_deploy", "onnxruntime"}


def test_a_process_that_fails_is_an_error_with_its_last_words(doubling: Path) -> None:
    match = r"m\.onnx: measuring its memory in a separate process .*ValueError"
    with pytest.raises(NumericsError, match=match):
        measure_footprint(
            [doubling], [], provider="CPUExecutionProvider", threads=1, session_config={}
        )
