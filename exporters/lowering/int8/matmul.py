"""Integer GEMM in standard ONNX, in the shape onnxruntime fuses to one node.

    x --> DynamicQuantizeLinear --> MatMulInteger(weight) --> Cast
      --> Mul(step of x * steps of the output channels)

becomes DynamicQuantizeMatMul, or MatMulIntegerToFloat where several layers share the quantized
input. With a fixed range the steps would be folded to a constant, which is not fused; but

    x --> QuantizeLinear --> DequantizeLinear --> MatMul(DequantizeLinear(weight))

becomes MatMulIntegerToFloat (measured on onnxruntime 1.31, CPU). These are looked up in `verify` by
their weight's name, ``<layer>.int8``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from epmq_deploy.exporters.lowering.int8.plan import activation_grid
from epmq_deploy.exporters.lowering.layers import add_initializer

INT8_SUFFIX = ".int8"


def integer_layers(graph: ir.Graph) -> frozenset[str]:
    """Dotted names of the layers that a graph multiplies by in integers."""
    names = (str(value.name) for node in graph for value in node.outputs)
    return frozenset(name.removesuffix(INT8_SUFFIX) for name in names if name.endswith(INT8_SUFFIX))


@dataclass
class Emitter:
    """Makes the nodes that replace one layer's.

    Attributes:
        graph: what initializers are added to.
        name: the layer's dotted name; values and nodes are named after it.
        nodes: the new ones so far, in order.
    """

    graph: ir.Graph
    name: str
    nodes: list[ir.Node] = field(default_factory=list)

    def tensor(self, suffix: str, array: NDArray[np.generic]) -> ir.Value:
        """Return an initializer."""
        return self.add(ir.Tensor(np.asarray(array, order="C"), name=f"{self.name}.{suffix}"))

    def shared(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Return an initializer that layers have in common."""
        if name not in self.graph.initializers:
            add_initializer(self.graph, ir.Tensor(array, name=name))
        return self.graph.initializers[name]

    def add(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Return an initializer that is named already."""
        return add_initializer(self.graph, tensor)

    def value(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        suffix: str,
        attributes: Mapping[str, object] | None = None,
        *,
        name: str | None = None,
    ) -> ir.Value:
        """Return the only output, ``<layer>.<suffix>``, of a new node."""
        return self.values(op_type, inputs, [suffix], attributes, name=name)[0]

    def values(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        suffixes: Sequence[str],
        attributes: Mapping[str, object] | None = None,
        *,
        name: str | None = None,
    ) -> Sequence[ir.Value]:
        """All outputs of a new node, which is called like the first unless it has a name."""
        outputs = [ir.Value(name=f"{self.name}.{suffix}") for suffix in suffixes]
        name = name or outputs[0].name
        self.nodes.append(ir.node(op_type, inputs, attributes or {}, name=name, outputs=outputs))
        return outputs


@dataclass(frozen=True)
class QuantizedInput:
    """uint8 activations with their scale and zero point, all graph values.

    Attributes:
        values: the activations.
        scale: their step.
        zero_point: what stands for 0.
        fixed: scale and zero point are constants.
    """

    values: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    fixed: bool


def quantize_input(emit: Emitter, x: ir.Value, span: tuple[float, float] | None) -> QuantizedInput:
    """Quantize activations per tensor, in the range given or in that of each run."""
    if span is None:
        suffixes = ("input", "input_scale", "input_zero_point")
        values, scale_value, zero_value = emit.values(
            "DynamicQuantizeLinear", [x], suffixes, name=f"{emit.name}.quantize"
        )
        return QuantizedInput(values, scale_value, zero_value, fixed=False)
    scale, zero_point = activation_grid(span)
    grid = (
        emit.tensor("input_scale", np.array(scale, np.float32)),
        emit.tensor("input_zero_point", np.array(zero_point, np.uint8)),
    )
    return QuantizedInput(emit.value("QuantizeLinear", [x, *grid], "input"), *grid, fixed=True)


def multiply(emit: Emitter, x: QuantizedInput, weight: ir.Value, scales: ir.Value) -> ir.Value:
    """``x W`` in float32; the multiplying node carries the layer's name.

    Args:
        emit: of the layer.
        x: ``[..., K]``.
        weight: int8 ``[K, N]``, zero point 0.
        scales: of the output channels, float32 ``[N]``.
    """
    if x.fixed:
        grid = [x.values, x.scale, x.zero_point]
        left = emit.value("DequantizeLinear", grid, "input_float")
        right = emit.value("DequantizeLinear", [weight, scales], "weight", {"axis": 1})
        return emit.value("MatMul", [left, right], "product", name=emit.name)
    zero = emit.shared("zero_int8", np.array(0, np.int8))
    products = emit.value(
        "MatMulInteger", [x.values, weight, x.zero_point, zero], "sums", name=emit.name
    )
    floats = emit.value("Cast", [products], "float_sums", {"to": ir.DataType.FLOAT})
    steps = emit.value("Mul", [x.scale, scales], "steps")
    return emit.value("Mul", [floats, steps], "product")


def weight_source(node: ir.Node) -> ir.Node | None:
    """Return the node that makes a multiplying node's int8 weight; None for any other."""
    weight = node.inputs[1] if node.op_type in ("MatMul", "MatMulInteger") else None
    source = None if weight is None else weight.producer()
    if source is not None and node.op_type == "MatMul":
        codes = source.inputs[0] if source.op_type == "DequantizeLinear" else None
        source = None if codes is None else codes.producer()
    return source
