"""Store codes of 2 bits in 2 bits each: half the size of the usual 4-bit containers.

onnxruntime's CPU kernel computes both correctly, but has a fast kernel for 2 bits only at accuracy
level 4. Measured on 1.31, 768 x 3072, blocks of 64 (``benchmarks/low_bit_kernels.py``,
``results/low_bit_kernels.json``): at level 0 one row takes 5 times as long as with 4 bits and 50
rows 2.8 times; at level 4 one row is as fast and 50 rows take 2.4 times as long.
"""

import onnx_ir as ir

from epmq_deploy.exporters.lowering.layers import constant, low_bit_nodes, read_packed
from epmq_deploy.exporters.packing.bit_packing import Bytes, pack_codes, pack_zero_points
from epmq_deploy.exporters.packing.packed_linear import unpack_linear

_CODES, _ZERO_POINTS = 1, 3
_BITS = 2


class NarrowToTwoBits(ir.passes.InPlacePass):
    """Repack every MatMulNBits node whose codes and zero points are all below 4."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Repack them."""
        narrowed = [_narrow(node) for node in low_bit_nodes(model.graph)]
        return ir.passes.PassResult(model, modified=any(narrowed))


def _narrow(node: ir.Node) -> bool:
    """Repack a node if its values fit, and return whether they did."""
    layer = unpack_linear(read_packed(node))
    if max(int(layer.codes.max()), int(layer.zero_points.max())) >= 2**_BITS:
        return False
    codes = pack_codes(layer.codes.numpy(), _BITS, layer.group_size)
    _set(node, _CODES, codes)
    if constant(node, _ZERO_POINTS) is not None:
        _set(node, _ZERO_POINTS, pack_zero_points(layer.zero_points.numpy(), _BITS))
    node.attributes["bits"] = ir.AttrInt64("bits", _BITS)
    return True


def _set(node: ir.Node, index: int, array: Bytes) -> None:
    value = node.inputs[index]
    assert value is not None, "the caller has read it"
    value.const_value = ir.Tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)
