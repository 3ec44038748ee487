"""Finding layers in an exported graph and making their inputs and outputs readable.

A layer is found by the name of its multiplying node or, where that became several, of its product;
see `epmq_deploy.exporters.lowering.layers` for the names.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.float32]

_CODES = ".codes"
_QUANTIZING = ("DynamicQuantizeLinear", "QuantizeLinear")
# Levels of the factors, padded to whole blocks, and what one level stands for.
_SMOOTHING = ("smoothing", "smoothing_unit")


@dataclass(frozen=True)
class Layer:
    """Where one layer is in a graph.

    Attributes:
        input: name of the value it multiplies; None where that is one of the graph's inputs, or
            was not asked for.
        output: name of the value it gives, bias included.
        factors: what its input was divided by per channel, ``[K]``, where it was smoothed.
    """

    input: str | None
    output: str
    factors: Array | None = None


@dataclass(frozen=True)
class FloatLayer(Layer):
    """A linear layer in float32.

    Attributes:
        weight: ``[K, N]``.
        bias: ``[N]``, or None.
    """

    weight: Array = field(kw_only=True)
    bias: Array | None = field(kw_only=True)

    def apply(self, inputs: Array) -> Array:
        """``[..., K]`` to ``[..., N]``."""
        product: Array = inputs @ self.weight
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class LayerValues:
    """A graph that also gives its layers' inputs and outputs.

    Attributes:
        model: the changed graph.
        layers: by dotted name, in running order.
    """

    model: ir.Model
    layers: Mapping[str, Layer]

    @contextmanager
    def saved(self) -> Iterator[Path]:
        """Yield the graph as a file, for as long as the block runs."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            # Apart, because protobuf refuses files beyond 2 GiB.
            ir.save(self.model, file, external_data="weights")
            yield file


def quantized_layers(file: Path) -> tuple[str, ...]:
    """Names of the layers whose codes a graph holds."""
    names = (str(name) for name in ir.load(file).graph.initializers)
    return tuple(name.removesuffix(_CODES) for name in names if name.endswith(_CODES))


def tap(file: Path, names: Collection[str], inputs_of: Collection[str] = ()) -> LayerValues:
    """Make layers of an exported graph readable; those it does not have are left out.

    Args:
        file: an exported graph.
        names: layers whose outputs are asked for.
        inputs_of: linear layers whose inputs are asked for as well.
    """
    model = ir.load(file)
    graph = model.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    layers: dict[str, Layer] = {}
    for node in graph:
        name = str(node.name)
        if name in names and name not in layers:
            product = values.get(f"{name}.product", node.outputs[0])
            layers[name] = _layer(
                node, product, _input(name, product) if name in inputs_of else None
            )
    readable = {str(value.name) for value in (*graph.outputs, *graph.inputs)}
    for layer in layers.values():
        for tensor in (layer.input, layer.output):
            if tensor is not None and tensor not in readable:
                readable.add(tensor)
                value = values[tensor]
                value.type = ir.TensorType(ir.DataType.FLOAT)
                graph.outputs.append(value)
    return LayerValues(model, layers)


def _layer(node: ir.Node, product: ir.Value, read: str | None) -> Layer:
    """Return a layer by the node of its name and the value its multiplication gives."""
    output, bias = product, None
    users = [use.node for use in product.uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        added = next((_array(value) for value in users[0].inputs if value is not product), None)
        # One number per channel; anything else is no bias.
        if added is not None and added.ndim == 1:
            output, bias = users[0].outputs[0], added
    weight = _array(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
    if weight is None:
        return Layer(read, str(output.name), _factors(node))
    if node.op_type == "Gemm":
        weight = weight.T if node.attributes.get_int("transB", 0) else weight
        bias = _array(node.inputs[2]) if len(node.inputs) > 2 else bias
    return FloatLayer(read, str(output.name), weight=weight, bias=bias)


def _factors(node: ir.Node) -> Array | None:
    """Smoothing factors of a layer in int8; see `epmq_deploy.exporters.lowering.int8.smoothing`."""
    assert node.graph is not None, "layers are nodes of a graph"
    held = {part: node.graph.initializers.get(f"{node.name}.{part}") for part in _SMOOTHING}
    levels, unit = (None if value is None else value.const_value for value in held.values())
    if levels is None or unit is None:
        return None
    factors: Array = levels.numpy().astype(np.float32).reshape(-1) * unit.numpy()
    return factors


def _input(name: str, product: ir.Value) -> str | None:
    """Return the value that a layer takes; None where it is the graph's input."""
    producer = product.producer()
    waiting = [] if producer is None else [producer]
    while waiting:
        node = waiting.pop()
        for value in node.inputs:
            source = None if value is None else value.producer()
            if value is None or source is None:
                continue
            # What is quantized is the input as it was smoothed. Layers that share an input share
            # both nodes, which one of them gives its name.
            quantizing = source.op_type in _QUANTIZING
            of_this_layer = str(source.name) == name or str(source.name).startswith(f"{name}.")
            if of_this_layer and not quantizing:
                waiting.append(source)
                continue
            read = source.inputs[0] if quantizing else value
            return None if read is None or read.producer() is None else str(read.name)
    return None


def _array(value: ir.Value | None) -> Array | None:
    """Values of an initializer that holds floats."""
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    return tensor.numpy()
