"""Attention as one operator, where a graph spells it out.

    x [B, S, H * D] -> Reshape [B, S, H, D] -> Transpose [B, H, S, D]     of queries, keys, values
    MatMul(queries, keys) -> Mul(scale) [-> Add(mask)] -> Softmax -> MatMul(values)
      -> Transpose [B, S, H, D] -> Reshape [B, S, H * D]

becomes ``Attention`` of the three ``x`` (ONNX operator set 23), whose kernel for CPU is faster than
the parts (onnxruntime 1.31, ``benchmarks/deploy.py``); onnxruntime does not fuse them by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from epmq_deploy.exporters.lowering.layers import only_reader, producer

# The first version of the default operator set with this operator.
ATTENTION_OPSET = 23

_HEADS_FIRST = (0, 2, 1, 3)
_KEYS_LAST = (0, 2, 3, 1)


@dataclass(frozen=True)
class _Attention:
    """One that can be replaced.

    Attributes:
        inputs: queries, keys, values ``[B, S, H * D]`` and, where there is one, the mask.
        heads: ``H``.
        scale: of the scores, positive.
        output: the Reshape that ends it.
    """

    inputs: tuple[ir.Value, ...]
    heads: int
    scale: float
    output: ir.Node


@dataclass(frozen=True)
class _Heads:
    """One of queries, keys and values.

    Attributes:
        flat: ``[B, S, H * D]``.
        count: ``H``.
        batch: ``B``.
    """

    flat: ir.Value
    count: int
    batch: int | ir.SymbolicDim

    @property
    def shared(self) -> tuple[int, int | ir.SymbolicDim]:
        """What is the same for queries, keys and values."""
        return self.count, self.batch


def has_attention(graph: ir.Graph) -> bool:
    """Whether there is any attention of that form."""
    return any(_all(graph))


class FuseAttention(ir.passes.InPlacePass):
    """Replace every attention of that form; any other is left as it is.

    Does nothing to a graph of an operator set before `ATTENTION_OPSET`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them."""
        available = model.graph.opset_imports[""] >= ATTENTION_OPSET
        return ir.passes.PassResult(model, modified=available and fuse_attention(model.graph) > 0)


def fuse_attention(graph: ir.Graph) -> int:
    """Replace every attention of that form, in place.

    Returns:
        How many were replaced.
    """
    attentions = list(_all(graph))
    for attention in attentions:
        old = attention.output.outputs[0]
        counts = {"q_num_heads": attention.heads, "kv_num_heads": attention.heads}
        node = ir.node("Attention", attention.inputs, {**counts, "scale": attention.scale})
        node.outputs[0].shape, node.outputs[0].type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(
            graph, attention.output, [attention.output], [node], [old], node.outputs
        )
    return len(attentions)


def _all(graph: ir.Graph) -> Iterator[_Attention]:
    candidates = (_around(node) for node in graph if node.op_type == "Softmax")
    return (attention for attention in candidates if attention is not None)


def _around(softmax: ir.Node) -> _Attention | None:
    scores = softmax.inputs[0]
    if scores is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    scores, mask = _masked(scores)
    scores, scale = _scaled(scores)
    product = producer(scores, "MatMul")
    last = only_reader(softmax.outputs[0], "MatMul")
    if product is None or last is None or last.inputs[0] is not softmax.outputs[0] or scale <= 0:
        return None
    queries = _heads(product.inputs[0], _HEADS_FIRST)
    keys = _heads(product.inputs[1], _KEYS_LAST)
    values = _heads(last.inputs[1], _HEADS_FIRST)
    output = _flattened(last.outputs[0])
    if queries is None or keys is None or values is None or output is None:
        return None
    # Parts repeat what has a batch or head of 1; the operator does not.
    if not queries.shared == keys.shared == values.shared:
        return None
    inputs = (queries.flat, keys.flat, values.flat, *([] if mask is None else [mask]))
    return _Attention(inputs, queries.count, scale, output)


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
        if _known(shape) == 4 and shape[2:] == scores.shape[2:]:  # type: ignore[index]
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
    return None if count is None else _Heads(flat, count, flat.shape[0])  # type: ignore[index]


def _flattened(value: ir.Value) -> ir.Node | None:
    """Return the Reshape to ``[B, S, H * D]`` that is all that is made of ``[B, H, S, D]``."""
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
    if flat is None or split is None or (_known(flat), _known(split)) != (3, 4):
        return None
    heads, size = split[2:]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return heads if flat[:2] == split[:2] and flat[2] == heads * size else None


def _known(shape: ir.Shape | None) -> int | None:
    """Return the number of axes if each has a size or a name, so that they can be compared."""
    if shape is None or any(getattr(size, "value", size) is None for size in shape):
        return None
    return len(shape)
