"""Attention as one operator, where a graph spells it out.

    x [B, S, H * D] -> Reshape [B, S, H, D] -> Transpose [B, H, S, D]     of queries, keys, values
    MatMul(queries, keys) -> Mul(scale) [-> Add(mask)] -> Softmax -> MatMul(values)
      -> Transpose [B, S, H, D] -> Reshape [B, S, H * D]

becomes ``Attention`` of the three ``x`` (ONNX operator set 23), whose kernel for CPU is faster than
the parts (onnxruntime 1.31, ``benchmarks/deploy.py``); onnxruntime does not fuse them by itself.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from epmq_deploy.exporters.graph import only_reader, producer

# The first version of the default operator set with this operator.
ATTENTION_OPSET = 23

_HEADS_FIRST = (0, 2, 1, 3)
_KEYS_LAST = (0, 2, 3, 1)


@dataclass(frozen=True)
class _Heads:
    """One of queries, keys and values.

    Attributes:
        flat: ``[B, S, H * D]``.
        count: ``H``.
    """

    flat: ir.Value
    count: int


def fuse_attention(graph: ir.Graph) -> int:
    """Replace every attention of that form, in place; any other is left as it is.

    Returns:
        How many were replaced.
    """
    fused = 0
    for node in list(graph):
        if node.op_type == "Softmax":
            fused += _fuse(graph, node)
    return fused


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    scores = softmax.inputs[0]
    if scores is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return False
    scores, mask = _masked(scores)
    scores, scale = _scaled(scores)
    product = producer(scores, "MatMul")
    last = only_reader(softmax.outputs[0], "MatMul")
    if product is None or last is None or last.inputs[0] is not softmax.outputs[0]:
        return False
    queries = _heads(product.inputs[0], _HEADS_FIRST)
    keys = _heads(product.inputs[1], _KEYS_LAST)
    values = _heads(last.inputs[1], _HEADS_FIRST)
    output = _flattened(last.outputs[0])
    if queries is None or keys is None or values is None or output is None:
        return False
    if not queries.count == keys.count == values.count:
        return False
    counts = {"q_num_heads": queries.count, "kv_num_heads": keys.count}
    inputs = [queries.flat, keys.flat, values.flat, *([] if mask is None else [mask])]
    node = ir.node("Attention", inputs, {**counts, "scale": scale}, name=softmax.name)
    made, old = node.outputs[0], output.outputs[0]
    made.shape, made.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, output, [output], [node], [old], [made])
    return True


def _masked(scores: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Scores before a mask is added, and the mask, ``[B or 1, H or 1, S, S]``."""
    add = producer(scores, "Add")
    if add is None or scores.shape is None:
        return scores, None
    for value, mask in (add.inputs, add.inputs[::-1]):
        if value is None or mask is None or producer(value, "Mul", "MatMul") is None:
            continue
        # onnxruntime's kernel repeats masks along the first two axes alone.
        shape = mask.shape
        if shape is not None and len(shape) == 4 and tuple(shape[2:]) == tuple(scores.shape[2:]):
            return value, mask
    return scores, None


def _scaled(scores: ir.Value) -> tuple[ir.Value, float]:
    """Scores before they are scaled, and by what."""
    multiply = producer(scores, "Mul")
    if multiply is not None:
        for value, factor in (multiply.inputs, multiply.inputs[::-1]):
            number = None if factor is None else factor.const_value
            if value is not None and number is not None and number.size == 1:
                return value, float(np.asarray(number.numpy()).item())
    return scores, 1.0


def _heads(value: ir.Value | None, order: tuple[int, ...]) -> _Heads | None:
    transpose = producer(value, "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != order:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    flat = None if reshape is None else reshape.inputs[0]
    if reshape is None or flat is None:
        return None
    count = _split_heads(flat.shape, reshape.outputs[0].shape)
    return None if count is None else _Heads(flat, count)


def _flattened(value: ir.Value) -> ir.Node | None:
    """The Reshape to ``[B, S, H * D]`` that is all that is made of ``[B, H, S, D]``."""
    transpose = only_reader(value, "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != _HEADS_FIRST:
        return None
    reshape = only_reader(transpose.outputs[0], "Reshape")
    if reshape is None:
        return None
    count = _split_heads(reshape.outputs[0].shape, transpose.outputs[0].shape)
    return None if count is None else reshape


def _split_heads(flat: ir.Shape | None, split: ir.Shape | None) -> int | None:
    """``H``, if the shapes are ``[B, S, H * D]`` and ``[B, S, H, D]``."""
    if flat is None or split is None or len(flat) != 3 or len(split) != 4:
        return None
    heads, size = split[2:]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return heads if tuple(flat[:2]) == tuple(split[:2]) and flat[2] == heads * size else None
