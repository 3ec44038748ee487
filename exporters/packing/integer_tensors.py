"""Codes as ONNX integer tensors (``INT4``, ``UINT4``, ``INT8``, ``UINT8``), and back."""

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from epmq_deploy.exporters.packing.bit_packing import Bytes, pack_flat
from epmq_deploy.quantization.results import QuantizedLinear

SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def integer_tensor(name: str, values: Bytes, dtype: ir.DataType) -> ir.TensorProtocol:
    """Codes or zero points, below 2**bits, as a tensor of their shape.

    Flipping the top bit subtracts ``2**(bits - 1)`` in two's complement.
    """
    bits = dtype.bitwidth
    flipped = values ^ np.uint8(2 ** (bits - 1)) if dtype.is_signed() else values
    laid_out = np.ascontiguousarray(flipped)
    if bits == 8:
        return ir.Tensor(laid_out.view(dtype.numpy()), name=name)
    return ir.PackedTensor(pack_flat(laid_out, bits), dtype, shape=laid_out.shape, name=name)


def read_layer(
    codes: ir.TensorProtocol,
    scales: NDArray[np.float32],
    zero_points: NDArray[np.generic] | None,
    columns: int,
    group_size: int,
) -> QuantizedLinear:
    """Return the layer that tensors with inputs first stand for.

    Args:
        codes: of ``[K or more, N]``, or more dimensions that flatten to it.
        scales: ``[G, N]``.
        zero_points: likewise; None for 0, whatever the type.
        columns: ``K``; what is beyond pads the last group.
        group_size: columns that share a scale.
    """
    bits = codes.dtype.bitwidth
    offset = 2 ** (bits - 1) if codes.dtype.is_signed() else 0
    rows = scales.shape[1]
    zeros = np.zeros(scales.shape, np.int16) if zero_points is None else zero_points
    stored = [
        torch.from_numpy(np.ascontiguousarray((array.astype(np.int16) + offset).T.astype(np.uint8)))
        for array in (codes.numpy().reshape(-1, rows)[:columns], zeros.reshape(-1, rows))
    ]
    return QuantizedLinear(
        codes=stored[0],
        scales=torch.from_numpy(scales.T.copy()),
        zero_points=stored[1],
        bits=bits,
        group_size=group_size,
        symmetric=bool((stored[1] == 2 ** (bits - 1)).all()),
    )
