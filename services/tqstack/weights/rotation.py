"""The rotation of a layer's inputs: random signs, then Hadamard blocks along the last axis.

Weights are stored rotated, so that y = rotate(x) . rotate(w): outliers of a row, or of the inputs,
spread over a block, and coordinates become as Gaussian as the codes expect. A width of 2880 has 15
blocks of 192.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

SMALLEST = 64  # of fewer coordinates, a rotation mixes too little


def block_size(width: int) -> int | None:
    """The largest 2^k or 12 * 2^k that divides width; None if it is below SMALLEST."""
    power = width & -width
    twelve = 12 * (width // 12 & -(width // 12)) if width % 12 == 0 else 0
    block = max(power, twelve)
    return block if block >= SMALLEST else None


@lru_cache(maxsize=64)
def signs(width: int, seed: int = 0) -> mx.array:
    """(width,) float32 of +1 and -1: splitmix64 (Steele, Lea, Flood 2014), whose numbers will not
    change with a library. Stored models depend on them."""
    with np.errstate(over="ignore"):
        z = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    flips = (z ^ (z >> np.uint64(31))) >> np.uint64(63)
    return mx.array(1 - 2 * flips.astype(np.float32))


def rotate(x: mx.array, seed: int = 0) -> mx.array:
    """(..., K) of any float type -> (..., K) float32."""
    return _hadamard(x.astype(mx.float32) * signs(x.shape[-1], seed))


def unrotate(x: mx.array, seed: int = 0) -> mx.array:
    """Inverse, and transpose, of `rotate`."""
    return _hadamard(x.astype(mx.float32)) * signs(x.shape[-1], seed)


def _hadamard(x: mx.array) -> mx.array:
    block = block_size(x.shape[-1])
    assert block, "a layer of this width is left as it is"
    if not x.size:
        return x  # MLX refuses empty arrays
    return mx.hadamard_transform(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)
