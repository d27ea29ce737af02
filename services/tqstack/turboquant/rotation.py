"""Random orthogonal transforms of the last axis: randomized Hadamard, dense QR, or none."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import mlx.core as mx
import numpy as np


class Rotation(Protocol):
    """An orthogonal map of (..., d) float32 arrays; `inverse` is its transpose."""

    def forward(self, x: mx.array) -> mx.array: ...

    def inverse(self, x: mx.array) -> mx.array: ...


class Identity:
    """No rotation: coordinates are coded as they are."""

    def forward(self, x: mx.array) -> mx.array:
        return x

    inverse = forward


def _hadamard_size(dim: int) -> int:
    """Largest p <= dim of the form 2^k or 12 * 2^k.

    `mx.hadamard_transform` takes other sizes too, but its matrices for 20 and 28 are not
    symmetric, and on the CPU it corrupts memory for sizes that it does not know.
    """
    power = 1 << (dim.bit_length() - 1)
    twelve = 12 << max((dim // 12).bit_length() - 1, 0) if dim >= 12 else 0
    return max(power, twelve)


class RandomHadamard:
    """Random signs, then a Hadamard matrix: O(d log d), d random bits of state.

    Where d is no Hadamard size, the largest one that fits is applied to the first coordinates and
    to the last, twice: overlapping blocks mix as well as a dense matrix does.
    """

    def __init__(self, dim: int, seed: int):
        self.dim = dim
        self.block = _hadamard_size(dim)
        self.starts = (0,) if self.block == dim else 2 * (0, dim - self.block)
        signs = np.random.default_rng([seed, dim]).integers(0, 2, (len(self.starts), self.block))
        self.signs = mx.array(2.0 * signs - 1, dtype=mx.float32)

    def forward(self, x: mx.array) -> mx.array:
        for start, sign in zip(self.starts, self.signs, strict=True):
            before, block, after = mx.split(x, (start, start + self.block), axis=-1)
            x = _join(before, _hadamard(block * sign), after)
        return x

    def inverse(self, x: mx.array) -> mx.array:
        for start, sign in zip(self.starts[::-1], self.signs[::-1], strict=True):
            before, block, after = mx.split(x, (start, start + self.block), axis=-1)
            x = _join(before, _hadamard(block) * sign, after)
        return x


def _hadamard(x: mx.array) -> mx.array:
    return mx.hadamard_transform(x) if x.size else x  # MLX refuses empty arrays


def _join(before: mx.array, block: mx.array, after: mx.array) -> mx.array:
    """Concatenates along the last axis, without a copy where the block is all there is."""
    parts = [part for part in (before, block, after) if part.shape[-1]]
    return block if len(parts) == 1 else mx.concatenate(parts, axis=-1)


class RandomOrthogonal:
    """A dense matrix, uniform over the orthogonal group (QR of a Gaussian matrix): O(d^2)."""

    def __init__(self, dim: int, seed: int):
        gaussian = np.random.default_rng([seed, dim]).standard_normal((dim, dim))
        q, r = np.linalg.qr(gaussian)
        self.matrix = mx.array((q * np.sign(np.diag(r))).astype(np.float32))

    def forward(self, x: mx.array) -> mx.array:
        return x @ self.matrix

    def inverse(self, x: mx.array) -> mx.array:
        return x @ self.matrix.T


ROTATIONS = ("hadamard", "qr", "none")


@lru_cache(maxsize=64)
def make_rotation(kind: str, dim: int, seed: int = 0) -> Rotation:
    """kind: "hadamard", "qr" or "none"; equal arguments give equal rotations on every machine."""
    if kind == "hadamard":
        return RandomHadamard(dim, seed)
    if kind == "qr":
        return RandomOrthogonal(dim, seed)
    if kind == "none":
        return Identity()
    raise ValueError(f"rotation is {kind!r}; choose one of {', '.join(ROTATIONS)}")
