"""What the kernels of this folder compute, in plain operations: their reference and fallback."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from tqstack.weights.codes import Code
from tqstack.weights.rotation import unrotate
from tqstack.weights.tiles import TILE

SCALE_PLACE = 8  # halves, as in inputs.h


class Rotated(NamedTuple):
    """Inputs in the domain of stored weights: a row of `rotate(x)` is its halves times its scale.

    halves: (..., K + SCALE_PLACE) float16: inputs in the order of inputs.h, and behind them the
    scale, a float32 in two halves' place.
    """

    halves: mx.array
    dtype: mx.Dtype  # of the inputs, and of what is computed from them

    @property
    def rows(self) -> int:
        return self.halves.size // self.halves.shape[-1]


@lru_cache(maxsize=16)
def _kept_order(width: int) -> mx.array:
    """Where each of K inputs comes from, as in rotate.h: of 32 an eighth lies side by side that a
    lane multiplies."""
    order = np.arange(width).reshape(-1, 2, 2, 4, 2).transpose(0, 3, 1, 2, 4)
    return mx.array(order.reshape(-1).astype(np.uint32))


@lru_cache(maxsize=16)
def _natural_order(width: int) -> mx.array:
    return mx.array(np.argsort(np.array(_kept_order(width))).astype(np.uint32))


def halved(rotated: mx.array, dtype: mx.Dtype) -> Rotated:
    """`rotated` (..., K) float32 as `Rotated`; scales are powers of two."""
    most = mx.abs(rotated).max(axis=-1)
    exponent = mx.where(most > 0, mx.floor(14 - mx.log2(most)), 0.0)
    factor = mx.power(2.0, mx.clip(exponent, -100, 100))
    halves = (rotated * factor[..., None]).astype(mx.float16)
    scale = (1 / factor)[..., None].view(mx.float16)
    unused = mx.zeros((*scale.shape[:-1], SCALE_PLACE - 2), mx.float16)
    kept = halves[..., _kept_order(rotated.shape[-1])]
    return Rotated(mx.concatenate([kept, scale, unused], axis=-1), dtype)


def restored(x: Rotated) -> mx.array:
    """(..., K) float32, rotated."""
    width = x.halves.shape[-1] - SCALE_PLACE
    scale = mx.contiguous(x.halves[..., width : width + 2]).view(mx.float32)
    return x.halves[..., _natural_order(width)].astype(mx.float32) * scale


def activated(both: mx.array) -> mx.array:
    """(B, 2 n, 1, K), gates and then what these are for -> (B, n, 1, K) in their type."""
    gate, up = mx.split(both.astype(mx.float32), 2, axis=1)
    return (gate * mx.sigmoid(gate) * up).astype(both.dtype)


def gated(answers: mx.array, gates: mx.array, stride: int) -> mx.array:
    """(B, heads, 1, D) and (B, width), where a head's gate is the last D of `stride` ->
    (B, 1, heads D)."""
    B, heads, _, D = answers.shape
    own = gates[:, : heads * stride].reshape(B, heads, 1, stride)[..., -D:].astype(mx.float32)
    gated = answers.astype(mx.float32) * mx.sigmoid(own)
    return gated.astype(answers.dtype).reshape(B, 1, heads * D)


def weights(weight: mx.array, scales: mx.array, code: Code) -> mx.array:
    """(..., N, K) float32, rotated."""
    return code.decode(weight) * scales.astype(mx.float32)[..., None]


def product(x: Rotated, weight: mx.array, scales: mx.array, code: Code) -> mx.array:
    """(..., K) and N x K weights -> (..., N)"""
    return (restored(x) @ weights(weight, scales, code).T).astype(x.dtype)


def expert_product(
    x: Rotated, weight: mx.array, scales: mx.array, code: Code, indices: mx.array
) -> mx.array:
    """(..., 1 or k, 1, K) and (..., k) experts -> (..., k, 1, N)"""
    own = weights(weight, scales, code).swapaxes(-1, -2)
    return mx.gather_mm(restored(x), own, rhs_indices=indices).astype(x.dtype)


def rows(ids: mx.array, weight: mx.array, scales: mx.array, code: Code, seed: int) -> mx.array:
    """(...) -> (..., K) float32 rows of N x K weights, not rotated."""
    tiles = weights(weight[ids // TILE][..., None, :, :], mx.array(1.0), code)
    own = mx.take_along_axis(tiles, (ids % TILE)[..., None, None], axis=-2)[..., 0, :]
    return unrotate(own * scales[ids].astype(mx.float32)[..., None], seed)


def random_weights(leading: tuple[int, ...], inputs: int, code: Code) -> tuple[mx.array, mx.array]:
    """Tiles and scales of so many (experts and) tiles of outputs: any bits are valid codes."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 1 << 32, (*leading, inputs // TILE, code.words), dtype=np.uint32)
    scales = rng.uniform(0.01, 0.02, (*leading[:-1], leading[-1] * TILE)).astype(np.float16)
    return mx.array(tiles), mx.array(scales)
