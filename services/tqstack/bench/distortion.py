"""The squared error of codecs on random unit vectors, beside the paper's and beside the limit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from tqstack.turboquant.codec import make_codec

# TurboQuant's own figures, arXiv 2504.19874, theorem 1: mean squared error at 1 to 4 bits.
PAPER = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
CODECS = [
    *("tq1-raw", "tq2-raw", "tq3-raw", "tq4-raw", "tq1", "tq2", "tq3", "tq4"),
    *("tcq2-l8", "tcq3-l8", "tcq4-l8", "affine2-g64", "affine3-g64", "affine4-g64"),
]
BATCH = 512


def measure(spec: str, dim: int, vectors: int, seed: int = 0) -> dict[str, Any]:
    """One row: errors of `spec` on uniformly random unit vectors of `dim` values.

    `limit` is the least error that any code of the same whole bits can have on Gaussian values,
    4^-bits; the norm's 16 bits come on top for every code here.
    """
    codec, rng = make_codec(spec, dim), np.random.default_rng(seed)
    squared, inner, bias, done = 0.0, 0.0, 0.0, 0
    while done < vectors:
        count = min(BATCH, vectors - done)
        x, q = (_unit(rng, count, dim) for _ in "xq")
        decoded = codec.unrotate(codec.decode(codec.encode(x)))
        error = ((decoded - x) * q).sum(-1)
        squared += _sum((decoded - x) ** 2)
        inner, bias, done = inner + _sum(error**2), bias + _sum(error), done + count
    bits = codec.bits_per_value - 16 / dim if not spec.startswith("affine") else None
    whole = round(bits) if bits is not None else None
    return {
        "codec": spec,
        "bits_per_value": round(codec.bits_per_value, 4),
        "squared_error": squared / vectors,
        "paper": PAPER.get(whole) if whole and spec.startswith("tq") else None,
        "limit": 4.0**-bits if bits is not None else 4.0**-codec.bits_per_value,
        "inner_product_error": inner / vectors * dim,
        "inner_product_bias": bias / vectors,
    }


def _unit(rng: np.random.Generator, count: int, dim: int) -> mx.array:
    x = rng.normal(size=(count, dim))
    return mx.array((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))


def _sum(x: mx.array) -> float:
    return float(np.array(x.sum()))
