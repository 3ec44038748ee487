"""What keeps the memory of an export small changes nothing about what it computes."""

import copy
import gc
import types
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from epmq_deploy.checkpoints.memory_map import release_mapped
from epmq_deploy.checkpoints.tensors import stored_tensors
from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters import memory
from epmq_deploy.exporters.formats.base import ExportContext
from epmq_deploy.exporters.formats.fp16 import FORMAT as FP16
from epmq_deploy.exporters.graphs.quantized_backbone import quantized_layers
from epmq_deploy.exporters.memory import (
    allow_allocator_settings,
    eager_free,
    frozen_gc,
    map_weights,
    release_weights_after_use,
)
from epmq_deploy.exporters.verification.parity import torch_outputs
from epmq_deploy.quantization.sequential import apply_quantized
from epmq_deploy.runtime.ort import graph_runs
from epmq_deploy.runtime.ort.graph_runs import run_graph, write_optimized


def test_mapped_weights_are_those_of_the_file_once_released(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 3)).requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = model[1].weight.data_ptr()
    map_weights(model, stored_tensors([tmp_path / "model.safetensors"]))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    # What is written does not reach the file, and is forgotten with what was read.
    model[0].weight.zero_()
    assert not model[0].weight.any()
    release_mapped()
    assert torch.equal(model[0].weight, expected["0.weight"])
    assert model[1].weight.data_ptr() == small


def test_modules_release_their_weights_when_they_have_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU()).requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    map_weights(model, stored_tensors([tmp_path / "model.safetensors"]))
    x = torch.randn(2, 512)
    expected = model(x)
    model[0].weight.zero_()
    with release_weights_after_use(model):
        model(x)
    assert torch.equal(model(x), expected)
    model[0].weight.zero_()
    model(x)
    assert not model[0].weight.any()


def test_the_allocator_is_changed_only_where_the_program_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(memory, "_call_glibc", lambda function, *_: calls.append(function))
    monkeypatch.setattr(memory, "_allocator_settings_allowed", False)
    with eager_free():
        pass
    assert calls == []
    allow_allocator_settings()
    with eager_free():
        assert calls == ["mallopt"]
    assert calls == ["mallopt", "mallopt"]


def test_objects_are_frozen_during_the_work_within() -> None:
    gc.unfreeze()
    with frozen_gc():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_objects_that_the_caller_froze_stay_frozen() -> None:
    kept: list[object] = []

    def is_frozen() -> bool:
        """Whether collections pass over it."""
        return not any(item is kept for item in gc.get_objects())

    assert not is_frozen()
    gc.freeze()
    try:
        with frozen_gc():
            assert is_frozen()
        assert is_frozen()
    finally:
        gc.unfreeze()
    assert not is_frozen()


def test_other_dtypes_stay_in_memory(tmp_path: Path) -> None:
    model = nn.Linear(512, 512).requires_grad_(False)
    save_file(
        {name: value.bfloat16() for name, value in model.state_dict().items()}, tmp_path / "a"
    )
    map_weights(model, stored_tensors([tmp_path / "a"]))
    model.weight.zero_()
    release_mapped()
    assert not model.weight.any()


def test_layers_dequantized_while_they_run(tools: types.SimpleNamespace) -> None:
    case = tools.make_case(lambda name, _: (4, 16, True), tools.outside)
    whole = copy.deepcopy(case.model)
    apply_quantized(whole.backbone, case.layers, case.replaced)
    expected = torch_outputs(whole, [(case.images,)])
    given = {name: case.model.backbone.get_parameter(f"{name}.weight").data for name in case.linear}
    with quantized_layers(case.model.backbone, case.layers, case.replaced):
        found = torch_outputs(case.model, [(case.images,)])
    assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
    for name, weight in given.items():
        assert torch.equal(case.model.backbone.get_parameter(f"{name}.weight"), weight)


def test_layers_that_share_a_weight_all_change() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)).requires_grad_(False)
    model[1].weight = model[0].weight
    layer = types.SimpleNamespace(dequantize=lambda: torch.eye(4))
    with quantized_layers(model, {"1": layer}, {}):
        assert torch.equal(model(torch.arange(4)), torch.eye(4))


@pytest.mark.parametrize("fmt", ["fp32", "matmulnbits"])
def test_process_of_its_own_computes_the_same(
    exported, fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported.graphs[fmt].path
    batches = [(torch.randn(2, 3, 16, 16),), (torch.randn(3, 3, 16, 16),)]
    here = run_graph(path, 0, batches)
    write_optimized(path, 0, tmp_path / "here.onnx")
    monkeypatch.setattr(graph_runs, "_LARGE", 0)
    apart = run_graph(path, 0, batches)
    write_optimized(path, 0, tmp_path / "apart.onnx")
    for one, other in zip(here, apart, strict=True):
        assert list(one) == list(other) == list(exported.case.model.output_names)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    nodes = [
        [(node.op_type, node.name) for node in ir.load(tmp_path / name).graph]
        for name in ("here.onnx", "apart.onnx")
    ]
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("large", [0, 2**30])
def test_graph_that_cannot_be_loaded(
    tmp_path: Path, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_runs, "_LARGE", large)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(NumericsError, match=r"broken\.onnx is not a valid ONNX model: .*Protobuf"):
        run_graph(tmp_path / "broken.onnx", 0, [(torch.zeros(1),)])


def test_float16_keeps_what_is_too_large_finite() -> None:
    values = np.full((1, 512), 1e6, np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 512]))
    weight = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([1, 512]),
        const_value=ir.Tensor(values, name="w"),
    )
    node = ir.node("Add", [x, weight])
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    node.outputs[0].shape = x.shape
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    FP16.plan({}, ExportContext()).lower(model)
    stored = model.graph.initializers["w"].const_value
    assert stored.dtype == ir.DataType.FLOAT16
    assert (stored.numpy() == np.finfo(np.float16).max).all()
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [
        ir.DataType.FLOAT
    ] * 2
