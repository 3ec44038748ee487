"""Bytes in, bytes out."""

import numpy as np
import pytest

from epmq_deploy.exporters.packing.bit_packing import (
    pack_codes,
    pack_flat,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)


def _codes(rows: int, columns: int, bits: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**bits, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("columns", "block"), [(64, 16), (50, 16), (7, 32), (257, 256)])
def test_codes_survive_packing(bits: int, columns: int, block: int) -> None:
    codes = _codes(3, columns, bits)
    packed = pack_codes(codes, bits, block)
    assert packed.shape == (3, -(-columns // block), block * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8])
def test_zero_points_survive_packing(bits: int, blocks: int) -> None:
    zero_points = _codes(3, blocks, bits)
    packed = pack_zero_points(zero_points, bits)
    assert packed.shape == (3, -(-blocks * bits // 8))
    np.testing.assert_array_equal(unpack_zero_points(packed, bits, blocks), zero_points)


def test_first_code_is_in_the_low_bits() -> None:
    codes = np.array([[1, 2, 3] + [0] * 13], dtype=np.uint8)
    assert pack_codes(codes, 4, 16)[0, 0, :2].tolist() == [0x21, 0x03]
    assert pack_codes(codes, 2, 16)[0, 0, :1].tolist() == [0b00_11_10_01]


def test_zero_point_rows_start_new_bytes() -> None:
    zero_points = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    assert pack_zero_points(zero_points, 4).tolist() == [[0x21, 0x03], [0x54, 0x06]]


def test_flat_packing_runs_across_rows() -> None:
    values = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=np.uint8)
    assert pack_flat(values, 4).tolist() == [0x21, 0x43, 0x65, 0x87, 0x09]
