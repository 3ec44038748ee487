"""A quantized layer as ``com.microsoft::MatMulNBits`` takes it, and back."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from epmq_deploy.errors import RecipeError
from epmq_deploy.exporters.packing.bit_packing import (
    Bytes,
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)
from epmq_deploy.quantization.results import QuantizedLinear

# What onnxruntime's CPU kernel accepts: powers of two in this range.
_MIN_BLOCK = 16
_MAX_BLOCK = 256
# Per-channel weights may choose freely: 128 is the largest block that every consumer of
# DequantizeLinear graphs we know of takes (TensorRT: 64 or 128), at 0.25 bits a weight for scales.
_CHANNEL_BLOCK = 128


@dataclass(frozen=True)
class PackedLinear:
    """Inputs and attributes of one MatMulNBits node.

    Attributes:
        codes: uint8 ``[N, k_blocks, block_size * bits / 8]``.
        scales: float32 ``[N, k_blocks]``.
        zero_points: uint8 ``[N, ceil(k_blocks * bits / 8)]``; None when all are the operator's
            default ``2**(bits - 1)``.
        bits: container width, 4 or 8.
        block_size: columns per block, a power of two in 16..256.
        in_features: ``K``.
    """

    codes: Bytes
    scales: NDArray[np.float32]
    zero_points: Bytes | None
    bits: int
    block_size: int
    in_features: int


def container_bits(bits: int) -> int:
    """Width the codes are stored in: 4 for codes of up to 4 bits, else 8."""
    return 4 if bits <= 4 else 8


def block_size_of(name: str, layer: QuantizedLinear) -> int:
    """Block size a layer is stored with; every block lies within one group.

    A group spans several blocks when it is larger than 256 or no power of two.

    Raises:
        RecipeError: no power of two from 16 on divides the group size.
    """
    block = block_size_for(layer.group_size, layer.in_features)
    if block is None:
        raise RecipeError(
            f"layer {name}: group size {layer.group_size} cannot be stored in ONNX; use a multiple "
            f"of {_MIN_BLOCK} (32, 64 or 128), or quantize per channel"
        )
    return block


def block_size_for(group_size: int, columns: int) -> int | None:
    """Block size for groups of so many columns; None where no power of two from 16 on fits."""
    if group_size >= columns:
        return _channel_block(columns)
    block = min(group_size & -group_size, _MAX_BLOCK)
    return block if block >= _MIN_BLOCK else None


def pack_linear(name: str, layer: QuantizedLinear) -> PackedLinear:
    """Pack a layer; scales and zero points of a group are repeated over its blocks.

    Raises:
        RecipeError: its group size fits no block size.
    """
    bits = container_bits(layer.bits)
    block = block_size_of(name, layer)
    blocks = -(-layer.in_features // block)
    group_of_block = np.arange(blocks) * block // layer.group_size
    zero_points = layer.zero_points.cpu().numpy()[:, group_of_block]
    is_default = bool((zero_points == 2 ** (bits - 1)).all())
    return PackedLinear(
        codes=pack_codes(layer.codes.cpu().numpy(), bits, block),
        scales=np.ascontiguousarray(layer.scales.cpu().numpy()[:, group_of_block]),
        zero_points=None if is_default else pack_zero_points(zero_points, bits),
        bits=bits,
        block_size=block,
        in_features=layer.in_features,
    )


def unpack_linear(packed: PackedLinear) -> QuantizedLinear:
    """Return the layer as it is stored: ``bits`` is the container's, ``group_size`` the block size.

    Its codes and its dequantized weight equal the packed layer's bit for bit.
    """
    blocks = packed.codes.shape[1]
    default = 2 ** (packed.bits - 1)
    if packed.zero_points is None:
        zero_points = np.full((packed.codes.shape[0], blocks), default, dtype=np.uint8)
    else:
        zero_points = unpack_zero_points(packed.zero_points, packed.bits, blocks)
    codes = unpack_codes(packed.codes, packed.bits, packed.in_features)
    return QuantizedLinear(
        codes=torch.from_numpy(codes),
        scales=torch.from_numpy(packed.scales.copy()),
        zero_points=torch.from_numpy(zero_points),
        bits=packed.bits,
        group_size=packed.block_size,
        symmetric=bool((zero_points == default).all()),
    )


def _channel_block(columns: int) -> int:
    dividing = columns & -columns
    if dividing >= _MIN_BLOCK:
        return min(dividing, _CHANNEL_BLOCK)
    # Nothing divides K: one short block wastes least, else the last of several is padded.
    return min(max(_MIN_BLOCK, 1 << (columns - 1).bit_length()), _CHANNEL_BLOCK)
