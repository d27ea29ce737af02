from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.turboquant.packing import codes_per_field, fields, pack, packed_shape, unpack


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    dim = 8 * draw(st.integers(1, 40))
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, 1 << bits, (*lead, dim)).astype(np.uint8), bits


def bit_stream(plane: mx.array, lead: tuple[int, ...], dim: int, bits: int) -> np.ndarray:
    """The codes read bit by bit from the documented layout, by numpy alone."""
    stream = np.unpackbits(np.array(plane).view(np.uint8), axis=-1, bitorder="little")
    return (stream.reshape(*lead, dim, bits) << np.arange(bits)).sum(-1)


@settings(deadline=None, max_examples=60)
@given(codes_and_bits())
def test_codes_lie_in_the_documented_bits_and_come_back_exactly(case):
    codes, bits = case
    packed = pack(mx.array(codes), bits)
    width, dtype = packed_shape(codes.shape[-1], bits)
    assert (packed.shape, packed.dtype) == ((*codes.shape[:-1], width), dtype)
    assert width * dtype.size == codes.shape[-1] * bits // 8
    assert np.array_equal(bit_stream(packed, codes.shape[:-1], codes.shape[-1], bits), codes)
    assert np.array_equal(np.array(unpack(packed, bits, codes.shape[-1])), codes)


@settings(deadline=None, max_examples=40)
@given(codes_and_bits())
def test_fields_are_neighbouring_codes_first_lowest(case):
    codes, bits = case
    count = codes_per_field(bits)
    groups = codes.reshape(*codes.shape[:-1], codes.shape[-1] // count, count).astype(int)
    expected = (groups << (bits * np.arange(count))).sum(-1)
    assert np.array_equal(np.array(fields(pack(mx.array(codes), bits), bits)), expected)


def test_a_slice_of_a_padded_cache_unpacks():
    codes = np.random.default_rng(0).integers(0, 8, (2, 3, 10, 64)).astype(np.uint8)
    packed = mx.concatenate([mx.zeros((2, 3, 5, 6), mx.uint32), pack(mx.array(codes), 3)], axis=2)
    assert np.array_equal(np.array(unpack(packed[:, 1:, 6:], 3, 64)), codes[:, 1:, 1:])


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}.*1 to 8"):
        packed_shape(64, bits)


@pytest.mark.parametrize("dim", [0, 12, 63])
def test_dims_that_do_not_pack_are_refused(dim):
    with pytest.raises(ValueError, match=f"dim is {dim}.*multiples of 8"):
        packed_shape(dim, 4)
