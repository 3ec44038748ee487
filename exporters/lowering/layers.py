"""The MatMulNBits graph that every format is lowered from, and how layers are found in it.

Naming, in every exported file: the node that multiplies by a quantized layer carries the layer's
dotted name, and the layer's initializers are ``<layer>.codes``, ``<layer>.scales`` and, where
present, ``<layer>.zero_points``. A linear layer that runs several times has a node a run; those
after the first are called ``<layer>#2``, ``<layer>#3`` and so on.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from epmq_deploy.errors import MismatchError
from epmq_deploy.exporters.packing.packed_linear import PackedLinear

DOMAIN = "com.microsoft"
OP_TYPE = "MatMulNBits"
LAYER_KEY = "epmq_deploy.layer"
_RUN = "#"


def low_bit_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """All MatMulNBits nodes; their names are the layers' once `NameLayers` ran."""
    return (node for node in graph if node.domain == DOMAIN and node.op_type == OP_TYPE)


def run_name(layer: str, run: int) -> str:
    """Return what the node of a layer's run is called, the first being 1."""
    return layer if run == 1 else f"{layer}{_RUN}{run}"


def layer_of(node_name: object) -> str:
    """Return the layer of a node named by ``run_name``."""
    return str(node_name).partition(_RUN)[0]


def linear_runs(graph: ir.Graph, layers: Collection[str]) -> frozenset[str]:
    """Return the names of the nodes that multiply the model's inputs by one of these layers.

    A node whose input is computed from constants alone, such as a table of positions, is left out:
    runtimes compute it once, when they load the file.
    """
    varying: set[ir.Value] = set(graph.inputs)
    names = set()
    for node in graph:
        if not any(value in varying for value in node.inputs if value is not None):
            continue
        varying.update(node.outputs)
        layer, _, run = str(node.name).partition(_RUN)
        if layer in layers and (not run or run.isdigit()):
            names.add(str(node.name))
    return frozenset(names)


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a named tensor and return its value."""
    value = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=tensor.shape,  # type: ignore[arg-type]
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def constant(node: ir.Node, index: int) -> np.ndarray | None:
    """Value of an input that is an initializer; None where the input is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if value.const_value is None:
        raise ValueError(f"node {node.name}: input {index} ({value.name}) is no initializer")
    return value.const_value.numpy()


def refuse_repeated(nodes: Iterable[ir.Node]) -> None:
    """Check that every node, as torch's exporter leaves them, stands for a layer of its own.

    Raises:
        MismatchError: names every layer that runs more than once.
    """
    runs = Counter(node.metadata_props[LAYER_KEY] for node in nodes)
    repeated = [f"layer {name} runs {count} times" for name, count in runs.items() if count > 1]
    if repeated:
        raise MismatchError("cannot export layers that run more than once", repeated)


def read_packed(node: ir.Node) -> PackedLinear:
    """Return what a MatMulNBits node multiplies by."""
    codes, scales = constant(node, 1), constant(node, 2)
    if codes is None or scales is None:
        raise ValueError(f"node {node.name}: codes or scales are missing")
    return PackedLinear(
        codes=codes,
        scales=scales.reshape(codes.shape[:2]),
        zero_points=constant(node, 3),
        bits=node.attributes.get_int("bits", 4),
        block_size=node.attributes.get_int("block_size"),
        in_features=node.attributes.get_int("K"),
    )


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of one of these types (any if none given)."""
    node = None if value is None else value.producer()
    return node if node is None or not op_types or node.op_type in op_types else None


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the only reader of a value if it is of that type; None otherwise."""
    readers = [use.node for use in value.uses()]
    alone = len(readers) == 1 and not value.is_graph_output()
    return readers[0] if alone and readers[0].op_type == op_type else None
