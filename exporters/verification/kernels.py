"""Check that an exported file holds the solver's codes and runs them in low-bit kernels."""

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from epmq_deploy.checkpoints.memory_map import release_mapped
from epmq_deploy.errors import NumericsError
from epmq_deploy.exporters.files import weightless
from epmq_deploy.exporters.lowering.int8.matmul import INT8_SUFFIX
from epmq_deploy.exporters.lowering.layers import DOMAIN, OP_TYPE, layer_of
from epmq_deploy.exporters.verification.codes import stored_layers
from epmq_deploy.quantization.results import QuantizedLinear
from epmq_deploy.quantization.solver.grid import expand_groups
from epmq_deploy.runtime.ort.graph_runs import write_optimized

_INTEGER_PRODUCTS = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def verify_valid(model: ir.Model, file: str) -> None:
    """Check a graph by ``onnx.checker``, shapes included, before it is written.

    Args:
        model: the graph.
        file: what to call it.

    Raises:
        NumericsError: the graph is not valid ONNX.
    """
    try:
        # The checker would copy large tensors twice.
        onnx.checker.check_model(weightless(model), full_check=True)
    # Its exceptions share no narrower base class with those of shape inference.
    except Exception as error:
        raise NumericsError(f"{file} is not a valid ONNX model: {error}") from error


def verify_codes(path: Path, layers: Mapping[str, QuantizedLinear]) -> None:
    """Check that a file holds exactly these layers, bit for bit.

    Raises:
        NumericsError: a layer is missing, unexpected, or differs in codes, scales or zero points;
            names every one.
    """
    problems, stored = [], set()
    for name, layer in stored_layers(path):
        stored.add(name)
        if name not in layers:
            problems.append(f"{name}: was never quantized")
        else:
            problems += [f"{name}: {part} differ" for part in _differences(layer, layers[name])]
        release_mapped()
    problems += [f"{name}: not in the file" for name in layers.keys() - stored]
    if problems:
        raise NumericsError(
            f"{path.name} does not hold what was quantized: {'; '.join(sorted(problems))}"
        )


def verify_int8_rows(path: Path, rows: Mapping[str, QuantizedLinear]) -> None:
    """Check that convolutions and embeddings are in a file as INT8 tensors, and only so.

    What onnxruntime makes of them is left to it: it looks up constant rows and keeps the result.

    Args:
        path: an exported file.
        rows: by dotted name.

    Raises:
        NumericsError: the codes are no INT8 initializer, or the float weight is in the file as
            well; names every layer.
    """
    tensors = {
        name: value.const_value
        for name, value in ir.load(path).graph.initializers.items()
        if value.const_value is not None
    }
    floats = [tensor for tensor in tensors.values() if tensor.dtype == ir.DataType.FLOAT]
    problems = []
    for name, layer in rows.items():
        codes = tensors.get(f"{name}.codes")
        if codes is None or codes.dtype != ir.DataType.INT8:
            problems.append(f"{name}: codes are no INT8 tensor")
        problems += [
            f"{name}: {tensor.name} is its weight in float"
            for tensor in floats
            if tensor.size == layer.codes.numel()
            and np.array_equal(tensor.numpy().ravel(), layer.dequantize().cpu().numpy().ravel())
        ]
    if problems:
        raise NumericsError(f"{path.name}: {'; '.join(sorted(problems))}")


def verify_runs_low_bit(
    path: Path,
    layers: Mapping[str, QuantizedLinear],
    accuracy_level: int,
    integer: Collection[str] = (),
    runs: Collection[str] | None = None,
) -> int:
    """Check that onnxruntime multiplies every linear layer with its low-bit kernel.

    Args:
        path: an exported file.
        layers: the linear ones, by dotted name.
        accuracy_level: of the MatMulNBits nodes.
        integer: layers, by dotted name, that are to run as integer GEMM instead.
        runs: names of the nodes that multiply by them; default: one a layer, called like it.

    Returns:
        Number of nodes that multiply by one of ``layers`` in the graph onnxruntime runs.

    Raises:
        NumericsError: the file cannot be loaded, or a layer runs as anything but one
            MatMulNBits node of the accuracy level asked for, or one integer GEMM; names every one.
    """
    graph = optimized_graph(path, accuracy_level)
    unfused = sorted(set(integer) - executed_integer_layers(graph))
    if unfused:
        raise NumericsError(
            f"{path.name}: onnxruntime would not run these layers as fused int8 products: "
            f"{', '.join(unfused)}"
        )
    levels = executed_low_bit_layers(graph, path.name)
    expected = set(layers if runs is None else runs)
    missing = sorted(expected - levels.keys() - set(integer))
    if missing:
        raise NumericsError(
            f"{path.name}: onnxruntime would not run these layers in low bits: {', '.join(missing)}"
        )
    other = sorted(name for name in levels if levels[name] != accuracy_level)
    if other:
        raise NumericsError(
            f"{path.name}: these layers would not run at accuracy level {accuracy_level}: "
            f"{', '.join(other)}"
        )
    return len(levels) + sum(layer_of(name) in layers for name in set(integer))


def executed_low_bit_layers(graph: onnx.GraphProto, file: str) -> dict[str, int]:
    """Accuracy level per MatMulNBits node, by name, of a graph that onnxruntime optimized.

    Fusing DequantizeLinear with MatMul, and an Add into MatMulNBits, keeps the name of the
    multiplying node, which is its layer's.

    Raises:
        NumericsError: two nodes share a name; ``file`` is what to call the graph.
    """
    nodes = [node for node in graph.node if node.domain == DOMAIN and node.op_type == OP_TYPE]
    repeated = [name for name, count in Counter(node.name for node in nodes).items() if count > 1]
    if repeated:
        raise NumericsError(f"{file}: several nodes are named {', '.join(repeated)}")
    return {node.name: _accuracy_level(node) for node in nodes}


def executed_integer_layers(graph: onnx.GraphProto) -> set[str]:
    """Layers that a graph onnxruntime optimized multiplies by in one fused integer product.

    Fusing names nodes anew; the weight, folded to one INT8 initializer, keeps its name.
    """
    folded = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
    weights = {
        node.input[1]
        for node in graph.node
        if node.domain == DOMAIN and node.op_type in _INTEGER_PRODUCTS
    }
    return {name.removesuffix(INT8_SUFFIX) for name in weights & folded}


def optimized_graph(path: Path, accuracy_level: int) -> onnx.GraphProto:
    """Return the graph that onnxruntime makes of a file on CPU, without large tensors' data.

    Raises:
        NumericsError: onnxruntime cannot load it.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        write_optimized(path, accuracy_level, optimized)
        return onnx.load(str(optimized), load_external_data=False).graph


def _accuracy_level(node: onnx.NodeProto) -> int:
    levels = [attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"]
    return int(levels[0]) if levels else 0


def _differences(stored: QuantizedLinear, solved: QuantizedLinear) -> list[str]:
    """Which of codes, scales and zero points differ, column by column."""
    if stored.codes.shape != solved.codes.shape:
        return ["shapes"]
    parts = [] if torch.equal(stored.codes, solved.codes.cpu()) else ["codes"]
    columns = solved.in_features
    for part in ("scales", "zero_points"):
        from_solver = expand_groups(getattr(solved, part).cpu(), solved.group_size, columns)
        in_file = expand_groups(getattr(stored, part), stored.group_size, columns)
        if not torch.equal(in_file, from_solver):
            parts.append(part)
    return parts
