"""Corrections of layers for every task, in standard ONNX.

    task -> Gather(DequantizeLinear(right INT4 [T, K, r], scales [T, 1, r])) -+
    x --------------------------------------------------------------> MatMul -+-> MatMul -> Add
    task -> Gather(DequantizeLinear(left INT4 [T, r, N])) --------------------+
    task -> Gather(DequantizeLinear(bias INT8 [T, 1, N]))

Naming, in every exported file with corrections: a layer's initializers are
``<layer>.correction.right``, ``.right_scales``, ``.left``, ``.bias`` and ``.bias_scale``. Scales of
``right`` are those of both factors; ``left`` has steps of 1. Values have no types: shape inference
finds them, and they would be half of what a small model's corrections take.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from epmq_deploy.exporters.lowering.layers import LAYER_KEY, add_initializer, refuse_repeated
from epmq_deploy.exporters.packing.integer_tensors import SIGNED, integer_tensor
from epmq_deploy.quantization.residuals.factors import BIAS_BITS, FACTOR_BITS, LayerResiduals

# A placeholder that torch's exporter cannot fold.
CORRECTIONS_DOMAIN = "epmq_deploy.corrections"
CORRECT = "Correct"

_PARTS = ("right", "right_scales", "left", "bias", "bias_scale")
_ONE = "epmq_deploy.one"


class LowerCorrections(ir.passes.InPlacePass):
    """Replace the placeholders by standard operators.

    Args:
        layers: corrections by dotted name; the placeholders hold none, as torch has no 4 bits.
    """

    def __init__(self, layers: Mapping[str, LayerResiduals]) -> None:
        self._layers = layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace them.

        Raises:
            MismatchError: a layer runs more than once.
        """
        graph = model.graph
        nodes = [node for node in graph if node.domain == CORRECTIONS_DOMAIN]
        refuse_repeated(nodes)
        for number, node in enumerate(nodes):
            name = node.metadata_props[LAYER_KEY]
            new = _lowered(graph, node, name, self._layers[name], f"c{number}")
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], new, node.outputs, new[-1].outputs
            )
        return ir.passes.PassResult(model, modified=bool(nodes))


def _lowered(
    graph: ir.Graph, node: ir.Node, name: str, residuals: LayerResiduals, prefix: str
) -> list[ir.Node]:
    """Return the nodes of one layer, the last of which gives what is added to its output.

    Nodes and values have short names, which count in small models.
    """
    x, task = node.inputs
    tensors = {
        part: add_initializer(graph, tensor) for part, tensor in stored(name, residuals).items()
    }
    new: list[ir.Node] = []

    def value(op: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        output = ir.Value(name=f"{prefix}.{len(new)}")
        new.append(ir.node(op, inputs, attributes, name=output.name, outputs=[output]))
        return output

    if _ONE not in graph.initializers:
        add_initializer(graph, ir.Tensor(np.ones((), np.float32), name=_ONE))
    columns = residuals.right.shape[2]
    scaled = [tensors["right"], tensors["right_scales"]]
    right = value("DequantizeLinear", scaled, axis=1, block_size=columns)
    middle = value("MatMul", [x, value("Gather", [right, task], axis=0)])
    left = value("DequantizeLinear", [tensors["left"], graph.initializers[_ONE]])
    output = value("MatMul", [middle, value("Gather", [left, task], axis=0)])
    if "bias" in tensors:
        bias = value("DequantizeLinear", [tensors["bias"], tensors["bias_scale"]])
        value("Add", [output, value("Gather", [bias, task], axis=0)])
    return new


def stored(name: str, residuals: LayerResiduals) -> dict[str, ir.TensorProtocol]:
    """Return the tensors of a layer's corrections as files hold them, by part."""

    def integers(part: str, codes: torch.Tensor, bits: int) -> ir.TensorProtocol:
        offset = 2 ** (bits - 1)
        unsigned = (codes.to(torch.int16) + offset).to(torch.uint8).numpy()
        return integer_tensor(f"{name}.correction.{part}", unsigned, SIGNED[bits])

    def floats(part: str, values: torch.Tensor) -> ir.TensorProtocol:
        return ir.Tensor(values.contiguous().numpy(), name=f"{name}.correction.{part}")

    tensors = {
        "right": integers("right", residuals.right.transpose(1, 2), FACTOR_BITS),
        "right_scales": floats("right_scales", residuals.scales[:, None]),
        "left": integers("left", residuals.left.transpose(1, 2), FACTOR_BITS),
    }
    if residuals.bias is not None and residuals.bias_scale is not None:
        tensors["bias"] = integers("bias", residuals.bias[:, None], BIAS_BITS)
        tensors["bias_scale"] = floats("bias_scale", residuals.bias_scale)
    return tensors


def read_corrections(graph: ir.Graph, name: str) -> LayerResiduals | None:
    """Return a layer's corrections; None where the graph holds none.

    Bit for bit what was stored: codes come back as int8.
    """
    held = {part: graph.initializers.get(f"{name}.correction.{part}") for part in _PARTS}
    arrays = {
        part: torch.from_numpy(_plain(value.const_value))
        for part, value in held.items()
        if value is not None and value.const_value is not None
    }
    if not {"right", "right_scales", "left"} <= arrays.keys():
        return None
    bias = arrays.get("bias")
    return LayerResiduals(
        left=arrays["left"].transpose(1, 2),
        right=arrays["right"].transpose(1, 2),
        scales=arrays["right_scales"][:, 0],
        bias=None if bias is None else bias[:, 0],
        bias_scale=arrays.get("bias_scale"),
    )


def _plain(tensor: ir.TensorProtocol) -> np.ndarray:
    values = tensor.numpy()
    return np.array(values, np.float32 if values.dtype == np.float32 else np.int8, order="C")
