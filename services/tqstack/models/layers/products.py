"""Products of a few tokens with a weight matrix on a CPU, in parts where that is faster.

OpenBLAS copies a matrix for a product of 2 rows or more, which takes longer than the product: four
rows cost four times one (1,024 x 384, AVX-512). Of small matrices it makes no copy. So the matrix
is taken as a stack of small ones, as it lies in memory. Other processors and libraries have other
limits: for each size of matrix it is measured once.
"""

from __future__ import annotations

import time
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

MOST_ROWS = 8  # beyond them the copy is a small part
PART = 1 << 18  # multiplications of a part: of more, OpenBLAS uses several threads
GAIN = 0.8  # of the time: less is noise


class Parts(nn.Linear):
    """`nn.Linear`, in parts for few tokens."""

    def __call__(self, x: mx.array) -> mx.array:
        count = _parts_for(x, self.weight)
        if count == 1:
            return super().__call__(x)
        y = in_parts(x, self.weight, count)
        return y + self.bias if "bias" in self else y


class HeadParts(nn.Embedding):
    """`nn.Embedding` that is the output head, too."""

    def as_linear(self, x: mx.array) -> mx.array:
        count = _parts_for(x, self.weight)
        return super().as_linear(x) if count == 1 else in_parts(x, self.weight, count)


def install(model: nn.Module) -> int:
    """Turn a model's linear layers into these; returns how many."""
    count = 0
    for module in model.modules():
        faster = {nn.Linear: Parts, nn.Embedding: HeadParts}.get(type(module))
        if faster is not None:
            module.__class__ = faster
            for rows in (1, 2, 4, 8):
                parts(rows, *module.weight.shape, module.weight.dtype)
            count += 1
    return count


def in_parts(x: mx.array, weight: mx.array, count: int) -> mx.array:
    """x @ weight.T: (..., K) and (N, K) -> (..., N)"""
    N, K = weight.shape
    stack = weight.reshape(count, N // count, K).swapaxes(1, 2)
    y = x.reshape(1, -1, K) @ stack  # (count, rows, N / count)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], N)


def _parts_for(x: mx.array, weight: mx.array) -> int:
    rows = x.size // x.shape[-1]
    if not 0 < rows <= MOST_ROWS:
        return 1
    return parts(1 << (rows - 1).bit_length(), *weight.shape, weight.dtype)


@lru_cache(maxsize=1024)
def parts(rows: int, N: int, K: int, dtype: mx.Dtype) -> int:
    """Parts in which a product of so many rows with (N, K) is fastest here; 1: undivided."""
    count = next((n for n in range(1, N + 1) if N % n == 0 and rows * K * (N // n) <= PART), N)
    if count == 1 or dtype != mx.float32:
        return 1
    x, weight = mx.zeros((rows, K)), mx.zeros((N, K))
    mx.eval(x, weight)
    whole, divided = float("inf"), float("inf")
    for _ in range(5):  # in turn, so that a busy moment hits both
        whole = min(whole, _seconds(x @ weight.T))
        divided = min(divided, _seconds(in_parts(x, weight, count)))
    return count if divided < GAIN * whole else 1


def _seconds(product: mx.array) -> float:
    began = time.perf_counter()
    mx.eval(product)
    return time.perf_counter() - began
