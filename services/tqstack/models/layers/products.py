"""Products of a few tokens with a matrix on a CPU, which lies in panels where that is faster.

OpenBLAS copies a matrix for a product of 2 rows or more, which takes longer than the product, and
reads it by rows for one; several threads that share a small product wait for each other. Its code
for small matrices does neither. So a matrix is kept as a stack of such: 64 outputs each, their
weights for an input side by side. Then a product takes as long as its matrix needs to come from
memory, for one row or for five (1,024 x 384, AVX-512, one thread: 79 and 95 us; as `nn.Linear` has
it 150 and 318). More rows are taken in pieces; long prompts put the matrix together again, a copy
that is a twentieth of their product.
OpenBLAS has that code for some processors only, and so it is measured whether panels pay.
"""

from __future__ import annotations

import time
from functools import cache

import mlx.core as mx
import mlx.nn as nn

SMALL = 1_000_000  # multiplications of a product for which OpenBLAS uses that code
ROWS = 8  # that every product must have room for
PIECED = 128  # rows; of more, copying the matrix costs less than reading its panels again and again
WIDTHS = (64, 32, 16)  # of panels, the faster ones first
TRIALS = 50  # of a tenth of a millisecond: a busy machine has quiet ones, too
GAIN = 0.7  # of the time: less is noise, or what threads that share a product lose to each other


class Panels(nn.Linear):
    """`nn.Linear` with its matrix in panels."""

    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self["panels"])
        return y + self["bias"] if "bias" in self else y

    @property
    def weight(self) -> mx.array:
        return matrix(self["panels"]).T


class HeadPanels(nn.Embedding):
    """`nn.Embedding` that is the output head, too."""

    def __call__(self, x: mx.array) -> mx.array:
        panels = self["panels"]
        width = panels.shape[-1]
        return panels.swapaxes(1, 2)[x // width, x % width]

    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self["panels"])

    @property
    def weight(self) -> mx.array:
        return matrix(self["panels"]).T


def install(model: nn.Module) -> int:
    """Turn a model's linear layers into these, where that pays; returns how many."""
    if not pays():
        return 0
    modules = dict(model.named_modules())
    heads = {} if any(path.endswith("lm_head") for path in modules) else {nn.Embedding: HeadPanels}
    count = 0
    for module in modules.values():
        faster = {nn.Linear: Panels, **heads}.get(type(module))
        width = faster and width_of(module["weight"])
        if faster and width:
            module["panels"] = in_panels(module.pop("weight"), width)
            mx.eval(module["panels"])  # one after the other, or all would be held twice
            module.__class__ = faster
            count += 1
    return count


def width_of(weight: mx.array) -> int | None:
    """Outputs of a panel of (N, K) weights; None: they stay as they are."""
    N, K = weight.shape
    fitting = (width for width in WIDTHS if N % width == 0 and ROWS * K * width <= SMALL)
    return next(fitting, None) if weight.dtype == mx.float32 else None


def in_panels(weight: mx.array, width: int) -> mx.array:
    """(N, K) -> (N / width, K, width)"""
    N, K = weight.shape
    return mx.contiguous(weight.reshape(N // width, width, K).swapaxes(1, 2))


def matrix(panels: mx.array) -> mx.array:
    """(N / width, K, width) -> (K, N)"""
    return panels.swapaxes(0, 1).reshape(panels.shape[1], -1)


def product(x: mx.array, panels: mx.array) -> mx.array:
    """(..., K) and (N / width, K, width) -> (..., N)"""
    K, width = panels.shape[1:]
    rows, most = x.size // K, SMALL // (K * width)
    if not 0 < rows <= PIECED:
        (panels,) = mx.depends([panels], [x])  # now, or all of a model's would be held at once
        return x @ matrix(panels)
    flat = x.reshape(1, rows, K)
    # (N / width, rows, width) each
    pieces = [flat[:, first : first + most] @ panels for first in range(0, rows, most)]
    y = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


@cache
def pays() -> bool:
    """Whether products of few rows with panels are faster here than with a matrix as it is."""
    x, weight = mx.zeros((4, 384)), mx.zeros((1024, 384))
    panels = in_panels(weight, WIDTHS[0])
    mx.eval(x, weight, panels)
    whole, parts = float("inf"), float("inf")
    for _ in range(TRIALS):  # in turn, so that a busy moment hits both
        whole = min(whole, _seconds(x @ weight.T))
        parts = min(parts, _seconds(product(x, panels)))
    return parts < GAIN * whole


def _seconds(product: mx.array) -> float:
    began = time.perf_counter()
    mx.eval(product)
    return time.perf_counter() - began
