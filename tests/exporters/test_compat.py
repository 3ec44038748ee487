"""Undocumented parts of other packages that exporters rely on are still as they were."""

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import nn

from epmq_deploy.exporters.compat import filled_cache, float16_proto, module_of


def test_float16_conversion_keeps_inputs_and_outputs() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], np.eye(2, dtype=np.float32))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [weight],
    )
    converted = float16_proto(helper.make_model(graph), keep=["x", "y"]).graph
    assert [item.type.tensor_type.elem_type for item in converted.input] == [TensorProto.FLOAT]
    assert [item.type.tensor_type.elem_type for item in converted.output] == [TensorProto.FLOAT]
    assert [item.data_type for item in converted.initializer] == [TensorProto.FLOAT16]
    assert isinstance(converted, onnx.GraphProto)


def test_nodes_know_the_module_they_were_traced_from() -> None:
    model = nn.Sequential().eval()
    model.add_module("inner", nn.Linear(3, 2))
    program = torch.onnx.export(model, (torch.ones(2, 3),), dynamo=True, verbose=False)
    assert program is not None
    modules = {module_of(node) for node in program.model.graph}
    assert "inner" in modules
    assert module_of(ir.node("Relu", [ir.Value(name="x")])) is None


def test_a_filled_cache_holds_the_very_tensors_and_appends_to_them() -> None:
    pairs = [(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)) for _ in range(2)]
    cache = filled_cache(pairs)
    assert len(cache.layers) == 2
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        assert layer.keys is keys
        assert layer.values is values
    assert cache.get_seq_length() == 5
    keys, values = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4)
    appended = cache.update(keys, values, 0)
    assert torch.equal(appended[0], torch.cat([pairs[0][0], keys], dim=2))
    assert torch.equal(appended[1], torch.cat([pairs[0][1], values], dim=2))
