"""Writes turboquant-mlx-full's format from its description, with numpy: nothing of ours in it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

# Of config.json's `quantization`.
FIELDS = {"mode": "turboquant", "bits": 3, "group_size": 64, "use_qjl": False}
FIELDS |= {"rotation": "hadamard", "rotation_seed": 42, "codebook": [0.5]}


class Coded(NamedTuple):
    """A layer's tensors, and the weights (*E, N, K) that they stand for, not rotated."""

    planes: dict[str, np.ndarray]
    weight: np.ndarray


def write_layer(
    weight: np.ndarray,
    levels: int = 8,
    group: int = 64,
    qjl: bool = False,
    rotated: bool = True,
    seed: int = 0,
) -> Coded:
    """Code weights (N, K), or of experts (E, N, K).

    Args:
        levels: of the codebook: 2^bits, or 3.
        rotated: False: as with `rotation: none`, signs of one and no Hadamard matrix.
    """
    random, inputs = np.random.default_rng(seed), weight.shape[-1]
    signs = random.choice([-1.0, 1.0], inputs) if rotated else np.ones(inputs)
    matrix = _hadamard(inputs) if rotated else np.eye(inputs)
    codebook = np.linspace(-2, 2, levels).astype(np.float16)
    codebook = np.sort(codebook + random.normal(0, 0.05, levels)).astype(np.float16)

    turned = (weight * signs) @ matrix.T
    groups = turned.reshape(*turned.shape[:-1], -1, group)
    scales = np.sqrt((groups**2).mean(-1)).astype(np.float16)
    middles = (codebook[1:] + codebook[:-1]) / 2
    codes = np.searchsorted(middles, groups / scales[..., None])
    coded = (codebook.astype(np.float64)[codes] * scales[..., None]).reshape(turned.shape)
    planes: dict[str, Any] = {
        "weight": _pack(codes.reshape(turned.shape), levels),
        "scales": scales,
        "codebook": codebook,
        "signs": signs.astype(np.float16),
    }
    if qjl:
        own = random.choice([-1.0, 1.0], inputs)
        residual, matrix_of_all = turned - coded, _hadamard(inputs)
        positive = ((residual * own) @ matrix_of_all.T) >= 0
        norms = np.linalg.norm(residual, axis=-1).astype(np.float16)
        planes |= {"qjl_packed": _pack(positive.astype(int), 2), "qjl_norms": norms}
        planes["qjl_signs"] = own.astype(np.float16)
        factor = norms.astype(np.float64) * math.sqrt(math.pi / 2) / math.sqrt(inputs)
        coded = coded + factor[:, None] * ((2.0 * positive - 1) @ matrix_of_all) * own
    return Coded(planes, ((coded @ matrix) * signs).astype(np.float32))


def _hadamard(width: int) -> np.ndarray:
    """(K, K): block-diagonal, of the largest m * 2^k that divides K; y = matrix @ x."""
    sizes = [m << k for m in (1, 12, 20, 28) for k in range(16)]
    block = max(size for size in sizes if width % size == 0)
    of_identity = mx.hadamard_transform(mx.eye(block), scale=1 / math.sqrt(block))
    return np.kron(np.eye(width // block), np.array(of_identity).astype(np.float64).T)


def _pack(codes: np.ndarray, levels: int) -> np.ndarray:
    """(..., K) -> (..., words) uint32"""
    per_word = 20 if levels == 3 else 32 // int(math.log2(levels))
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word)), np.uint64)
    for i in range(per_word):
        digits = codes[..., i::per_word].astype(np.uint64)
        words[..., : digits.shape[-1]] += digits * np.uint64(levels**i)
    return words.astype(np.uint32)
