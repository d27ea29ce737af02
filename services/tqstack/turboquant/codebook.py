"""Lloyd-Max codebooks for one coordinate of a randomly rotated vector.

A unit vector of dimension d, rotated at random, is uniform on the sphere; one of its coordinates
has the density (1 - x^2)^((d-3)/2) on [-1, 1] (Zandieh et al., arXiv 2504.19874, Lemma 1). Values
here are scaled by sqrt(d), so that they have unit variance and tend to the standard normal as d
grows: one scale for every dimension, and a codebook whose numbers a reader recognises.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_GRID = 1 << 17  # points of the numerical integrals
_TAIL = 8.5  # standard deviations; the normal tail beyond holds 2e-17
MAX_BITS = 8


def _density(dim: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Grid over the support and the unnormalised density on it; dim None is the Gaussian limit."""
    edge = _TAIL if dim is None else min(np.sqrt(dim), _TAIL)
    x = np.linspace(-edge, edge, _GRID)
    if dim is None:
        return x, np.exp(-0.5 * x * x)
    inside = np.clip(1 - x * x / dim, 0, None)
    return x, inside ** ((dim - 3) / 2)


@lru_cache(maxsize=64)
def lloyd_max(bits: int, dim: int | None = None) -> np.ndarray:
    """Centroids that minimise the squared error of one coordinate.

    bits: 1 to 8. dim: vector dimension (at least 4), or None for the standard normal.
    Returns (2^bits,) float32 that float16 holds exactly, ascending, symmetric, in units of the
    coordinate's standard deviation; read-only, because it is cached.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; a Lloyd-Max codebook has 1 to {MAX_BITS} bits")
    if dim is not None and dim < 4:
        raise ValueError(
            f"dim is {dim}; the density of a coordinate needs a dimension of 4 or more"
        )
    x, p = _density(dim)
    mass = np.concatenate([[0.0], np.cumsum((p[1:] + p[:-1]) / 2)])
    xp = x * p
    moment = np.concatenate([[0.0], np.cumsum((xp[1:] + xp[:-1]) / 2)])

    # Start from the high-rate optimum (density^(1/3)); Lloyd's steps then only polish it.
    companded = np.cumsum(np.cbrt(p))
    levels = (np.arange(1 << bits) + 0.5) / (1 << bits)
    centroids = np.interp(levels, companded / companded[-1], x)
    for _ in range(5000):
        bounds = np.concatenate([x[:1], (centroids[1:] + centroids[:-1]) / 2, x[-1:]])
        updated = np.diff(np.interp(bounds, x, moment)) / np.diff(np.interp(bounds, x, mass))
        step = np.abs(updated - centroids).max()
        centroids = updated
        if step < 1e-9:
            break
    # Exact in half precision, so that kernels multiply what `decode` gives; costs no distortion.
    centroids = ((centroids - centroids[::-1]) / 2).astype(np.float16).astype(np.float32)
    centroids.setflags(write=False)
    return centroids


def boundaries(codebook: np.ndarray) -> np.ndarray:
    """(2^b,) ascending centroids -> (2^b - 1,) midpoints: a value above i of them has code i."""
    return (codebook[1:] + codebook[:-1]) / 2
