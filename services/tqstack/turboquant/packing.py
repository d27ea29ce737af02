"""Dense packing: a vector's b-bit codes as one little-endian bit stream, no bit wasted.

Code i of a vector takes bits [i*b, (i+1)*b) of its stream. Eight codes fill exactly b bytes, so
a lane that owns 8 neighbouring values reads b whole bytes: one word at 4 bits, two of three
words' worth at 3 bits. The plane is uint32 wherever the stream fills whole words (every even
multiple of 32 bits), else uint8; byte for byte they are the same on a little-endian machine.
"""

from __future__ import annotations

import mlx.core as mx

MAX_BITS = 8
CODES_PER_GROUP = 8  # this many b-bit codes fill b bytes


def packed_shape(dim: int, bits: int) -> tuple[int, mx.Dtype]:
    """(width, dtype) of the last axis that holds dim codes of the given bits."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; codes have 1 to {MAX_BITS} bits")
    if dim <= 0 or dim % CODES_PER_GROUP:
        raise ValueError(f"dim is {dim}; packing takes positive multiples of {CODES_PER_GROUP}")
    stream_bytes = dim * bits // 8
    return (stream_bytes // 4, mx.uint32) if stream_bytes % 4 == 0 else (stream_bytes, mx.uint8)


def _lanes(lane: int, offset: int, width: int) -> mx.array:
    """A uint64 with `width` ones at `offset` in each lane of `lane` bits."""
    ones = ((1 << width) - 1) << offset
    return mx.array(sum(ones << start for start in range(0, 64, lane)), dtype=mx.uint64)


def pack(codes: mx.array, bits: int) -> mx.array:
    """(..., d) integers below 2^bits -> (..., width) of `packed_shape(d, bits)`.

    Eight codes are one 64-bit integer; three folds close the gaps between its 1, 2 and 4 byte
    lanes, which costs a tenth of shifting code by code.
    """
    dim = codes.shape[-1]
    width, dtype = packed_shape(dim, bits)
    groups = codes.astype(mx.uint8).view(mx.uint64)
    if bits < 8:
        for lane, held in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
            low = groups & _lanes(2 * lane, 0, held)
            groups = low | ((groups >> (lane - held)) & _lanes(2 * lane, held, held))
    stream = groups.view(mx.uint8).reshape(*codes.shape[:-1], dim // 8, 8)[..., :bits]
    stream = stream.reshape(*codes.shape[:-1], dim * bits // 8)
    return stream.view(dtype).reshape(*codes.shape[:-1], width)


def unpack(packed: mx.array, bits: int, dim: int) -> mx.array:
    """Inverse of `pack`: (..., width) -> (..., dim) uint8."""
    groups = _groups(packed, bits, mx.uint64)
    if bits < 8:
        for lane, held in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
            high = (groups & _lanes(2 * lane, held, held)) << (lane - held)
            groups = (groups & _lanes(2 * lane, 0, held)) | high
    return groups.view(mx.uint8).reshape(*packed.shape[:-1], dim)


def _groups(packed: mx.array, group_bytes: int, dtype: mx.Dtype) -> mx.array:
    """The stream cut into groups of some bytes, each zero-extended to one integer of `dtype`."""
    stream = packed.view(mx.uint8)
    count = stream.shape[-1] // group_bytes
    groups = stream.reshape(*packed.shape[:-1], count, group_bytes)
    if group_bytes < dtype.size:
        pad = mx.zeros((*groups.shape[:-1], dtype.size - group_bytes), dtype=mx.uint8)
        groups = mx.concatenate([groups, pad], axis=-1)
    return groups.view(dtype)[..., 0]


def codes_per_field(bits: int) -> int:
    """How many neighbouring codes `fields` gives at once: a whole byte of them, or a pair."""
    return 8 // bits if 8 % bits == 0 else 2


def fields(packed: mx.array, bits: int) -> mx.array:
    """Neighbouring codes as one integer each, the first code lowest: indices of a lookup table.

    (..., width) -> (..., d / codes_per_field(bits)) uint8 for 1, 2, 4, 8 bits (no work at all),
    else uint32 or uint64.
    """
    if 8 % bits == 0:
        return packed.view(mx.uint8)
    group_bytes = 3 if bits in (3, 6) else bits  # 24, 40 or 56 bits: a whole number of pairs
    dtype = mx.uint32 if group_bytes == 3 else mx.uint64
    groups = _groups(packed, group_bytes, dtype)
    shifts = mx.arange(0, 8 * group_bytes, 2 * bits).astype(dtype)
    pairs = (groups[..., None] >> shifts) & mx.array((1 << 2 * bits) - 1, dtype=dtype)
    return pairs.flatten(-2)
