"""How the codes of a weight matrix lie in memory: tiles of 16 outputs and 16 inputs.

A tile's 256 codes are one circular bit stream. They are in the order in which a group of 32 lanes
holds the left factor of a 16 x 16 matrix product (`mma.m16n8k16` of CUDA, four 8 x 8 matrices of
Metal): lane l owns values 8 l to 8 l + 7, so that it reads `bits` whole bytes and multiplies what
it decodes without handing it on.
"""

from __future__ import annotations

from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

TILE = 16  # outputs and inputs of a tile
VALUES = TILE * TILE
_VALUE = np.arange(VALUES)
_LANE, _OWN = _VALUE // 8, _VALUE % 8
_ROW = _LANE // 4 + 8 * (_OWN // 2 % 2)
_COLUMN = 2 * (_LANE % 4) + _OWN % 2 + 8 * (_OWN // 4)
ORDER = TILE * _ROW + _COLUMN  # value i of a stream -> its place in the tile, row by row
PLACE = np.argsort(ORDER)  # place in the tile -> value of the stream
Array = TypeVar("Array", np.ndarray, mx.array)


def to_tiles(matrix: np.ndarray) -> np.ndarray:
    """(N, K) -> (N / 16, K / 16, 256) values in the order of a stream."""
    N, K = matrix.shape
    tiles = matrix.reshape(N // TILE, TILE, K // TILE, TILE).swapaxes(1, 2)
    return tiles.reshape(N // TILE, K // TILE, VALUES)[..., ORDER]


def from_tiles(values: Array) -> Array:
    """(..., N / 16, K / 16, 256) in the order of a stream -> (..., N, K)"""
    *batch, rows, columns, _ = values.shape
    place: Any = PLACE if isinstance(values, np.ndarray) else mx.array(PLACE)
    tiles = values[..., place].reshape(*batch, rows, columns, TILE, TILE)
    return tiles.swapaxes(-3, -2).reshape(*batch, rows * TILE, columns * TILE)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """(..., 256) uint8 codes -> (..., 8 * bits) uint32"""
    ones = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(ones.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little").view("<u4")


def windows(words: mx.array, bits: int, window: int) -> mx.array:
    """(..., 8 * bits) uint32 -> (..., 256) uint16: the `window` bits that start at each code,
    around the end of the stream to its start.

    Eight codes fill `bits` bytes; with the two bytes that follow they are one 64-bit integer.
    """
    octets = words.view(mx.uint8).reshape(*words.shape[:-1], VALUES // 8, bits)
    following = mx.roll(octets.flatten(-2), -bits, -1).reshape(octets.shape)[..., :2]
    if bits == 1:  # the second byte is the next but one
        following = mx.concatenate([following, mx.roll(octets, -2, -2)], axis=-1)
    zeros = mx.zeros((*octets.shape[:-1], 8 - bits - 2), dtype=mx.uint8)
    whole = mx.concatenate([octets, following, zeros], axis=-1).view(mx.uint64)
    shifts = mx.arange(0, 8 * bits, bits).astype(mx.uint64)
    found = (whole >> shifts) & mx.array((1 << window) - 1, dtype=mx.uint64)
    return found.astype(mx.uint16).flatten(-2)
