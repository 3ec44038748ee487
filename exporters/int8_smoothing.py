"""Divide the inputs of layers per channel, in the norm before them where there is one."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from epmq_deploy.exporters.graph import add_initializer, constant

# Their last inputs are a gain and, for the first, a bias per channel.
_NORMS = ("LayerNormalization", "RMSNormalization")


def divide_input(graph: ir.Graph, factors: Mapping[ir.Node, Tensor | None]) -> None:
    """Divide the first input of each node by its factors.

    Gain and bias of a norm take the division in where every user of the norm's output wants the
    same; elsewhere it is a multiplication.

    Args:
        graph: changed in place.
        factors: float32 ``[K]`` by node, one tensor for nodes that share an input and its division;
            None for none.
    """
    # Groups may read one value: cross attention of all blocks that of the encoder.
    wanted: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    given = {id(found): found for found in factors.values() if found is not None}
    for node, found in factors.items():
        if found is not None and node.inputs[0] is not None:
            wanted.setdefault((node.inputs[0], id(found)), []).append(node)
    for (value, key), nodes in wanted.items():
        reciprocals = (1 / given[key]).numpy()
        norm = _norm_for(value, nodes)
        if norm is None:
            _insert_mul(graph, value, nodes, reciprocals)
        else:
            _scale_norm(graph, norm, reciprocals)


def _norm_for(value: ir.Value, nodes: Iterable[ir.Node]) -> ir.Node | None:
    """The norm whose output only these nodes read."""
    norm = value.producer()
    if norm is None or norm.op_type not in _NORMS or value.is_graph_output():
        return None
    last = norm.attributes.get_int("axis", -1) == -1
    constants = all(v is None or v.const_value is not None for v in norm.inputs[1:])
    readers = {use.node for use in value.uses()}
    return norm if last and constants and readers == set(nodes) else None


def _scale_norm(graph: ir.Graph, norm: ir.Node, reciprocals: np.ndarray) -> None:
    # New initializers: equal ones of several norms may have been merged.
    for index, part in enumerate(("gain", "bias"), start=1):
        array = constant(norm, index)
        if array is not None:
            tensor = ir.Tensor(array * reciprocals, name=f"{norm.name}.smoothed_{part}")
            norm.replace_input_with(index, add_initializer(graph, tensor))


def _insert_mul(
    graph: ir.Graph, value: ir.Value, nodes: list[ir.Node], reciprocals: np.ndarray
) -> None:
    name = f"{nodes[0].name}.smooth"
    tensor = add_initializer(graph, ir.Tensor(reciprocals, name=f"{name}_factors"))
    output = ir.Value(name=f"{name}_input")
    made = ir.node("Mul", [value, tensor], name=name, outputs=[output])
    graph.insert_before(nodes[0], made)
    for node in nodes:
        node.replace_input_with(0, output)
