"""From raw vectors to unit-variance coordinates and one stored scale each, whatever comes in."""

from __future__ import annotations

import mlx.core as mx

SCALE_DTYPE = mx.float16
_SCALE_MAX = 65504.0  # largest finite float16
_TINY = 1e-20  # smaller vectors underflow the float16 scale by far


def bounded(x: mx.array) -> tuple[mx.array, mx.array]:
    """(..., d) of any float type -> (..., d) float32 in [-1, 1] and its (..., 1) magnitude.

    Dividing by the largest entry first keeps squares of huge values finite. A vector that holds
    NaN or Inf, and one too small to be stored, becomes zeros with magnitude 0: it cannot spoil
    the vectors beside it.
    """
    x = x.astype(mx.float32)
    magnitude = mx.abs(x).max(axis=-1, keepdims=True)
    finite = mx.isfinite(x).all(axis=-1, keepdims=True)
    usable = finite & (magnitude > _TINY)
    magnitude = mx.where(usable, magnitude, 0.0)
    return mx.where(usable, x / mx.where(usable, magnitude, 1.0), 0.0), magnitude


def standardised(y: mx.array) -> tuple[mx.array, mx.array]:
    """(..., d) -> the same direction with norm sqrt(d), and its (..., 1) norm; zeros stay zeros."""
    norm = mx.linalg.norm(y, axis=-1, keepdims=True)
    return y * (y.shape[-1] ** 0.5 / mx.maximum(norm, _TINY)), norm


def stored(scale: mx.array) -> mx.array:
    """float32 scales as float16, saturated: finite for every input."""
    return mx.clip(scale, -_SCALE_MAX, _SCALE_MAX).astype(SCALE_DTYPE)
