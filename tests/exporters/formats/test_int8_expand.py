"""int8-expand: what onnxruntime makes of the file, and what int8 costs."""

import dataclasses
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from epmq_deploy.errors import NumericsError, RecipeError
from epmq_deploy.exporters.formats import formats_of
from epmq_deploy.exporters.formats.base import ExportContext, FormatPlan
from epmq_deploy.exporters.lowering.int8.plan import Int8Plan, int8_error, plan_layers
from epmq_deploy.exporters.lowering.int8.smoothing import divide_input
from epmq_deploy.exporters.verification.kernels import verify_runs_low_bit
from epmq_deploy.models.blocks import Group
from epmq_deploy.quantization.results import LayerInputs, QuantizedLinear
from epmq_deploy.quantization.solver.grid import expand_groups
from epmq_deploy.recipe import ExportOptions

FORMAT = "int8-expand"


def inputs_of(rows: Tensor, weight: Tensor) -> LayerInputs:
    """Statistics of rows ``[n, K]``."""
    output = float((rows @ weight.T).square().sum(dim=1).mean())
    return LayerInputs(rows.amin(0), rows.amax(0), rows.square().mean(0), output)


def calibrated(case: Any, tools: Any, **options: Any) -> ExportContext:
    """Statistics of every layer in the blocks on random images."""
    model = tools.dequantized_model(case)
    seen: dict[str, list[Tensor]] = {name: [] for name in case.linear}

    def keep(name: str) -> Any:
        return lambda module, given: seen[name].append(given[0].flatten(0, -2))

    for name in case.linear:
        model.backbone.get_submodule(name).register_forward_pre_hook(keep(name))
    torch.manual_seed(1)
    model(torch.randn(32, 3, 16, 16))
    blocks = model.family.blocks(model.backbone)
    groups = tuple(group for block in blocks for group in block.groups)
    known = {name for group in groups for name in group.layers}
    inputs = {
        name: inputs_of(torch.cat(rows), case.layers[name].dequantize())
        for name, rows in seen.items()
        if name in known
    }
    return ExportContext(ExportOptions(**options), inputs, groups)


@pytest.fixture(scope="module")
def case(tools: types.SimpleNamespace) -> Any:
    """Ragged K, asymmetric, and norms with outlier channels."""
    made = tools.make_case(lambda name, weight: (4, 32, False))
    for name in ("layer_norm1", "layer_norm2"):
        for block in range(2):
            full = f"vision_model.encoder.layers.{block}.{name}.weight"
            gain = made.model.backbone.get_parameter(full).detach().clone()
            gain[::16] *= 20
            made.replaced[full] = gain
    return made


@pytest.fixture(scope="module")
def smoothed(case: Any, tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The case's graph with statistics, and its plans."""
    context = calibrated(case, tools, int8_error_budget=1.0)
    folder = tmp_path_factory.mktemp("smoothed")
    graph = tools.export(case, [FORMAT], folder, context=context)[1]
    plans = plan_layers(case.linear, context.inputs, context.groups, "dynamic", 1.0)
    return types.SimpleNamespace(graph=graph, plans=plans, context=context)


def optimized(path: Path, folder: Path) -> onnx.GraphProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def reference_weight(layer: QuantizedLinear, factors: Tensor | None) -> tuple[Any, Any]:
    """Int8 weight ``[N, K]`` and channel scales, from the layer's definition."""
    columns = layer.in_features
    zero = expand_groups(layer.zero_points, layer.group_size, columns).numpy().astype(np.float32)
    scale = expand_groups(layer.scales, layer.group_size, columns).numpy()
    ones = np.ones(columns, np.float32) if factors is None else factors.numpy()
    steps = (layer.codes.numpy() - zero) * ones
    largest = np.abs((layer.codes.numpy() - zero) * scale * ones).max(axis=1, keepdims=True)
    channels = largest / np.float32(127)
    return np.rint(steps * (scale / channels)), channels


def test_expanded_weights_are_the_rounded_ones(case: Any, smoothed: Any, tmp_path: Path) -> None:
    graph = optimized(smoothed.graph.path, tmp_path)
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    assert any(plan.factors is not None for plan in smoothed.plans.values())
    for name, layer in case.linear.items():
        weight = stored[f"{name}.int8"]
        expected, _ = reference_weight(layer, smoothed.plans[name].factors)
        assert weight.dtype == np.int8
        assert np.array_equal(weight.T, expected)
        assert np.abs(weight.astype(int)).max() == 127


def test_unscaled_weights_of_every_width(exported: Any, tmp_path: Path) -> None:
    graph = optimized(exported.graphs[FORMAT].path, tmp_path)
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for name, layer in exported.case.linear.items():
        expected, channels = reference_weight(layer, None)
        weight = stored[f"{name}.int8"].T
        # Scales that are powers of two apart may round to the other side of a half.
        assert np.abs(weight - expected).max() <= 1
        exact = layer.dequantize().numpy()
        assert np.abs(weight * channels - exact).max() <= 0.5001 * channels.max()


def test_outputs_are_near(exported: Any, tools: Any) -> None:
    images = torch.randn(5, 3, 16, 16)
    expected = tools.dequantized_model(exported.case)(images)
    actual = tools.run(exported.graphs[FORMAT].path, images)
    for one, other in zip(actual, expected, strict=True):
        wanted = other.numpy()
        assert np.linalg.norm(one - wanted) < 0.05 * np.linalg.norm(wanted)


def test_file_is_standard_onnx(smoothed: Any) -> None:
    model = onnx.load(str(smoothed.graph.path))
    assert {entry.domain for entry in model.opset_import} == {""}
    counts = Counter(node.op_type for node in model.graph.node)
    # Queries, keys and values share theirs: four a block.
    assert counts["DynamicQuantizeLinear"] == 8


def test_smoothing_is_exact_in_float(case: Any, smoothed: Any, tools: Any, tmp_path: Path) -> None:
    """With the float weight it stands for in place of every integer product."""
    model = ir.load(smoothed.graph.path)
    for node in list(model.graph):
        if node.op_type != "MatMulInteger":
            continue
        name = str(node.name)
        factors = smoothed.plans[name].factors
        weight = case.layers[name].dequantize()
        weight = weight if factors is None else weight * factors
        held = ir.Value(name=f"{name}.float", const_value=ir.tensor(weight.T.numpy().copy()))
        model.graph.register_initializer(held)
        product = next(other for other in model.graph if other.name == f"{name}.product")
        float_input = node.inputs[0].producer().inputs[0]
        made = ir.node("MatMul", [float_input, held])
        model.graph.insert_before(product, made)
        ir.convenience.replace_all_uses_with(product.outputs[0], made.outputs[0])
    path = tmp_path / "float.onnx"
    ir.save(model, path)
    images = torch.randn(3, 3, 16, 16)
    expected = tools.dequantized_model(case)(images)
    for one, other in zip(tools.run(path, images), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=1e-4)


def test_norms_take_factors_in(smoothed: Any) -> None:
    """No multiplication is left in front of layers that a norm feeds."""
    model = onnx.load(str(smoothed.graph.path))
    names = {node.name for node in model.graph.node}
    for name, plan in smoothed.plans.items():
        if name.endswith(("q_proj", "fc1")):
            assert plan.factors is not None
            assert f"{name}.smooth" not in names


def test_groups_may_divide_one_value_each_in_its_own_way() -> None:
    """Cross attention of all blocks reads what the encoder gives."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 3), np.float32) for name in ("k", "v", "next_k")}
    factors = [torch.rand(8) + 0.5, torch.rand(8) + 0.5]
    wanted = dict(zip(weights, [factors[0], factors[0], factors[1]], strict=True))
    tensors = [
        numpy_helper.from_array(weight * wanted[name].numpy()[:, None], f"{name}.weight")
        for name, weight in weights.items()
    ]
    nodes = [helper.make_node("MatMul", ["x", f"{n}.weight"], [n], name=n) for n in weights]
    x, *outputs = (helper.make_tensor_value_info(name, 1, None) for name in ("x", *weights))
    graph = helper.make_graph(nodes, "three", [x], outputs, tensors)
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    divide_input(model.graph, {node: wanted[str(node.name)] for node in list(model.graph)})
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = rng.standard_normal((4, 8), np.float32)
    found = session.run(None, {"x": rows})
    for one, weight in zip(found, weights.values(), strict=True):
        np.testing.assert_allclose(one, rows @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gain_first", [True, False])
def test_a_norm_that_is_spelled_out_takes_factors_in(gain_first: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 3), np.float32) for name in ("first", "second")}
    gain = rng.random(8, np.float32) + 0.5
    operands = ["gain", "x"] if gain_first else ["x", "gain"]
    nodes = [helper.make_node("Mul", operands, ["normed"], name="norm")]
    nodes += [helper.make_node("MatMul", ["normed", f"{n}.w"], [n], name=n) for n in arrays]
    factors = torch.rand(8) + 0.5
    tensors = [numpy_helper.from_array(gain, "gain")]
    tensors += [
        numpy_helper.from_array(array * factors.numpy()[:, None], f"{name}.w")
        for name, array in arrays.items()
    ]
    x, *outputs = (helper.make_tensor_value_info(name, 1, None) for name in ("x", *arrays))
    graph = helper.make_graph(nodes, "norm", [x], outputs, tensors)
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    divide_input(model.graph, dict.fromkeys(layers, factors))
    assert [node.op_type for node in model.graph] == ["Mul", "MatMul", "MatMul"]
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = rng.standard_normal((4, 8), np.float32)
    for one, array in zip(session.run(None, {"x": rows}), arrays.values(), strict=True):
        np.testing.assert_allclose(one, rows * gain @ array, rtol=1e-4, atol=1e-5)


def one_layer(layer: QuantizedLinear, plan: Int8Plan, rows: Tensor) -> Tensor:
    """A layer's outputs in onnxruntime, in int8."""
    from epmq_deploy.exporters.formats.int8_expand import int8_passes
    from epmq_deploy.exporters.packing.packed_linear import pack_linear

    packed = pack_linear("layer", layer)
    arrays = {"codes": packed.codes, "scales": packed.scales, "zero_points": packed.zero_points}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *(f"layer.{part}" for part, array in arrays.items() if array is not None)],
        ["y"],
        name="layer",
        domain="com.microsoft",
        K=layer.in_features,
        N=layer.out_features,
        bits=packed.bits,
        block_size=packed.block_size,
    )
    tensors = [
        numpy_helper.from_array(array, f"layer.{part}")
        for part, array in arrays.items()
        if array is not None
    ]
    x, y = (helper.make_tensor_value_info(name, 1, None) for name in "xy")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "layer", [x], [y], tensors)
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    FormatPlan(int8_passes({"layer": plan})).lower(model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"x": rows.numpy()})[0])


@pytest.mark.parametrize("outliers", [1.0, 40.0])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_error_is_as_expected(tools: Any, outliers: float, activations: Any) -> None:
    torch.manual_seed(3)
    layer = tools.quantize(torch.randn(96, 128), 4, 32, False)
    rows = torch.randn(400, 128) + 0.3
    rows[:, ::40] *= outliers
    weight = layer.dequantize()
    inputs = {"layer": inputs_of(rows, weight)}
    plan = plan_layers({"layer": layer}, inputs, [Group(("layer",))], activations, 1.0)["layer"]
    plain = dataclasses.replace(plan, factors=None, span=None)
    exact = rows @ weight.T
    errors = {}
    for name, chosen in {"smoothed": plan, "plain": plain}.items():
        wrong = one_layer(layer, chosen, rows) - exact
        errors[name] = float(wrong.norm() / exact.norm())
        expected = int8_error(weight, inputs["layer"], chosen.factors)
        assert 0.8 * expected < errors[name] < 1.1 * expected
    assert plan.error == int8_error(weight, inputs["layer"], plan.factors)
    if outliers > 1:
        assert errors["smoothed"] < 0.6 * errors["plain"]


def test_layers_beyond_the_budget_stay(
    case: Any, smoothed: Any, tools: Any, tmp_path: Path
) -> None:
    errors = sorted(plan.error for plan in smoothed.plans.values())
    budget = (errors[5] + errors[6]) / 2
    context = calibrated(case, tools, int8_error_budget=budget)
    graph = tools.export(case, [FORMAT], tmp_path, context=context)[1]
    stay = {name for name, plan in smoothed.plans.items() if plan.error > budget}
    nodes = onnx.load(str(graph.path)).graph.node
    assert {node.name for node in nodes if node.op_type == "MatMulNBits"} == stay
    assert {node.name for node in nodes if node.op_type == "MatMulInteger"} == (
        case.linear.keys() - stay
    )
    assert 0 < len(stay) < len(case.linear) == graph.low_bit_nodes
    assert {name for name, item in graph.layers.items() if item["kernel"] == "int8"} == (
        case.linear.keys() - stay
    )
    # A norm whose output one of its layers needs unscaled keeps its gain.
    expected = tools.dequantized_model(case)(case.images)
    for one, other in zip(tools.run(graph.path, case.images), expected, strict=True):
        assert np.linalg.norm(one - other.numpy()) < 0.05 * float(other.norm())


def test_static_ranges(case: Any, tools: Any, tmp_path: Path) -> None:
    context = calibrated(case, tools, int8_activations="static", int8_error_budget=1.0)
    graph = tools.export(case, [FORMAT], tmp_path, context=context)[1]
    counts = Counter(node.op_type for node in optimized(graph.path, tmp_path).node)
    assert counts["MatMulIntegerToFloat"] == len(case.linear)
    assert not counts["DynamicQuantizeLinear"] + counts["DynamicQuantizeMatMul"]
    expected = tools.dequantized_model(case)(case.images)
    for one, other in zip(tools.run(graph.path, case.images), expected, strict=True):
        assert np.linalg.norm(one - other.numpy()) < 0.05 * float(other.norm())


@pytest.mark.parametrize("known", [True, False])
def test_errors_that_are_not_known_are_said(
    case: Any, tools: Any, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    context = calibrated(case, tools) if known else ExportContext()
    formats_of([FORMAT])[0].plan(case.linear, context)
    assert ("errors of layers in int8 cannot be estimated" in caplog.text) is not known


def test_static_ranges_need_statistics(case: Any, tools: Any, tmp_path: Path) -> None:
    context = ExportContext(ExportOptions(int8_activations="static"))
    with pytest.raises(RecipeError, match=r"export\.int8_activations: dynamic"):
        tools.export(case, [FORMAT], tmp_path, context=context)


def test_layer_that_is_not_fused_is_found(case: Any, smoothed: Any, tmp_path: Path) -> None:
    layer = "vision_model.encoder.layers.1.mlp.fc2"
    model = onnx.load(str(smoothed.graph.path))
    (product,) = (node for node in model.graph.node if node.name == f"{layer}.product")
    detour = helper.make_node("Relu", [product.input[0]], ["detour"])
    model.graph.node.insert(list(model.graph.node).index(product), detour)
    product.input[0] = "detour"
    path = tmp_path / "tampered.onnx"
    onnx.save(model, str(path))
    with pytest.raises(NumericsError, match=rf"fused int8 products: {layer}$"):
        verify_runs_low_bit(path, case.linear, 0, case.linear)


def test_no_statistics_no_smoothing(exported: Any) -> None:
    assert {item["int8_error"] for item in exported.graphs[FORMAT].layers.values()} == {None}
    assert formats_of([FORMAT])[0].plan({}, ExportContext()).details == {}
