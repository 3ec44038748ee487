"""The byte layout of low-bit tensors: several codes to a byte, the first in the lowest bits.

Layouts follow the contrib operator specification of ``com.microsoft::MatMulNBits`` (ONNX Runtime,
``docs/ContribOperators.md``) and, for ``INT4``/``UINT4`` tensors, the ONNX type specification
(``docs/docsgen/source/technical/int4.md``). Widths are 2, 4 or 8 bits.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack_codes(codes: Bytes, bits: int, block_size: int) -> Bytes:
    """Pack a weight's codes as input ``B`` of MatMulNBits.

    Args:
        codes: uint8 ``[N, K]``, each below ``2**bits``.
        bits: container width, 2, 4 or 8.
        block_size: columns per block; the last block is padded with code 0.

    Returns:
        uint8 ``[N, k_blocks, block_size * bits // 8]`` with ``k_blocks = ceil(K / block_size)``.
    """
    rows, columns = codes.shape
    blocks = -(-columns // block_size)
    padded = np.pad(codes, ((0, 0), (0, blocks * block_size - columns)))
    return _pack_last_axis(padded.reshape(rows, blocks, block_size), bits)


def unpack_codes(packed: Bytes, bits: int, columns: int) -> Bytes:
    """Inverse of `pack_codes`: uint8 ``[N, columns]`` from ``[N, k_blocks, blob]``."""
    codes = _unpack_last_axis(packed, bits)
    return np.ascontiguousarray(codes.reshape(packed.shape[0], -1)[:, :columns])


def pack_zero_points(zero_points: Bytes, bits: int) -> Bytes:
    """Pack zero points as MatMulNBits wants them; each row starts a new byte.

    Args:
        zero_points: uint8 ``[N, k_blocks]``, each below ``2**bits``.
        bits: container width, 2, 4 or 8.

    Returns:
        uint8 ``[N, ceil(k_blocks * bits / 8)]``.
    """
    per_byte = 8 // bits
    padding = -zero_points.shape[1] % per_byte
    return _pack_last_axis(np.pad(zero_points, ((0, 0), (0, padding))), bits)


def unpack_zero_points(packed: Bytes, bits: int, blocks: int) -> Bytes:
    """Inverse of `pack_zero_points`: uint8 ``[N, blocks]``."""
    return np.ascontiguousarray(_unpack_last_axis(packed, bits)[:, :blocks])


def pack_flat(values: Bytes, bits: int) -> Bytes:
    """Pack a tensor of any shape in row-major order, as ONNX stores ``INT4``/``UINT4``.

    Args:
        values: uint8, each below ``2**bits`` (signed values as their two's complement bits).
        bits: width, 2, 4 or 8.

    Returns:
        uint8 ``[ceil(values.size * bits / 8)]``; spare bits of the last byte are 0.
    """
    flat = values.reshape(-1)
    return _pack_last_axis(np.pad(flat, (0, -flat.size % (8 // bits))), bits)


def _pack_last_axis(values: Bytes, bits: int) -> Bytes:
    """``[..., n]`` values to ``[..., n * bits / 8]`` bytes; ``n`` fills whole bytes."""
    per_byte = 8 // bits
    lanes = values.reshape(*values.shape[:-1], values.shape[-1] // per_byte, per_byte)
    packed = np.zeros(lanes.shape[:-1], dtype=np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def _unpack_last_axis(packed: Bytes, bits: int) -> Bytes:
    """``[..., n]`` bytes to ``[..., n * 8 / bits]`` values."""
    lanes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    values: Bytes = np.stack(lanes, axis=-1).astype(np.uint8, copy=False)
    return values.reshape(*packed.shape[:-1], packed.shape[-1] * (8 // bits))
