"""Divide layers' inputs per channel, inside the norm before them if there is one."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from epmq_deploy.exporters.lowering.layers import add_initializer, constant, producer

# Which inputs hold a gain and, for the first, a bias per channel. A norm that is spelled out ends
# with a multiplication by its gain.
_GAINS = {"LayerNormalization": (1, 2), "RMSNormalization": (1,), "Mul": (0, 1)}


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
    readers: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    divisors = {id(divisor): divisor for divisor in factors.values() if divisor is not None}
    for node, divisor in factors.items():
        if divisor is not None and node.inputs[0] is not None:
            readers.setdefault((node.inputs[0], id(divisor)), []).append(node)
    for (value, key), nodes in readers.items():
        reciprocals = (1 / divisors[key]).numpy()
        norm = _norm_for(value, nodes)
        if norm is None:
            _insert_mul(graph, value, nodes, reciprocals)
        else:
            _scale_norm(graph, norm, reciprocals)


def _norm_for(value: ir.Value, nodes: Iterable[ir.Node]) -> ir.Node | None:
    """Return the norm whose output only these nodes read."""
    norm = producer(value, *_GAINS)
    if norm is None or value.is_graph_output() or norm.attributes.get_int("axis", -1) != -1:
        return None
    gains = [norm.inputs[index] for index in _gains(norm)]
    held = [gain.const_value for gain in gains if gain is not None]
    constants = bool(held) and all(gain is not None and len(gain.shape) == 1 for gain in held)
    readers = {use.node for use in value.uses()}
    return norm if constants and readers == set(nodes) else None


def _gains(norm: ir.Node) -> list[int]:
    """Return the inputs to divide: all that a norm has, or the constant one of a product."""
    indices = [index for index in _GAINS[norm.op_type] if index < len(norm.inputs)]
    if norm.op_type != "Mul":
        return indices
    return [index for index in indices if _is_constant(norm.inputs[index])]


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _scale_norm(graph: ir.Graph, norm: ir.Node, reciprocals: np.ndarray) -> None:
    # New initializers: equal ones of several norms may have been merged.
    for index in _gains(norm):
        array = constant(norm, index)
        if array is not None:
            tensor = ir.Tensor(array * reciprocals, name=f"{norm.name}.smoothed_{index}")
            norm.replace_input_with(index, add_initializer(graph, tensor))


def _insert_mul(
    graph: ir.Graph, value: ir.Value, nodes: list[ir.Node], reciprocals: np.ndarray
) -> None:
    name = f"{nodes[0].name}.smooth"
    tensor = add_initializer(graph, ir.Tensor(reciprocals, name=f"{name}_factors"))
    output = ir.Value(name=f"{name}_input")
    product = ir.node("Mul", [value, tensor], name=name, outputs=[output])
    graph.insert_before(nodes[0], product)
    for node in nodes:
        node.replace_input_with(0, output)
