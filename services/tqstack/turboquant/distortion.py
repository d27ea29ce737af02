"""Squared error of codecs on random directions, beside the paper's and the best there can be."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .codec import Codec

PAPER = {1: 0.36, 2: 0.117, 3: 0.03, 4: 0.009}
"""Bits -> mean squared error of Algorithm 1 (arXiv 2504.19874, Theorem 1), as printed there."""


@dataclass(frozen=True)
class Distortion:
    """Mean errors of decoded unit vectors, in units of their squared norm."""

    codec: str
    bits_per_value: float
    error: float
    """As decoded."""
    rescaled: float
    """With the best scale for each vector: 1 - cos^2, which no choice of scale improves."""
    limit: float
    """4^-bits, of the best code at the stored size (Shannon's rate-distortion function)."""


def distortion(codec: Codec, *, vectors: int = 4096, seed: int = 0) -> Distortion:
    """Measure `codec` on unit vectors of uniformly random direction."""
    x = np.random.default_rng(seed).standard_normal((vectors, codec.dim))
    x = mx.array((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
    rotated, decoded = np.array(codec.rotate(x)), np.array(codec.decode(codec.encode(x)))
    product, square = (rotated * decoded).sum(-1), np.square(decoded).sum(-1)
    return Distortion(
        codec=codec.spec,
        bits_per_value=codec.bits_per_value,
        error=float(np.square(decoded - rotated).sum(-1).mean()),
        rescaled=float(np.mean(1 - product**2 / square)),
        limit=4.0**-codec.bits_per_value,
    )
