"""A Gated DeltaNet layer's single token between its matrices: the launch of `delta_token.h`, and
its twin in plain operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tqstack.attention.kernels.arguments import at_least_8, struct
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import beyond_rounding, check, random, trusted
from tqstack.models.layers.gated_delta import gated_delta

THREADS, LANES = 512, 8  # as in delta_token.h
MOST_VALUES = 64  # of the state that a thread keeps in registers
_FOLDER = Path(__file__).parent
DELTA_TOKEN = Program(
    name="delta_token",
    headers=(_FOLDER / "gated_delta.h", _FOLDER / "sums.h", _FOLDER / "delta_token.h"),
    call="""
SHARED_ARRAY float memory[2 * DK + 2 * DV + 3];
delta_token<DK, DV, TAPS>(projected, gates, past, state, filters, log_rate, bias, weight,
                          (IN(DeltaTokenCall))call, y, new_past, new_state, memory, tid, block.x,
                          block.y);""",
    inputs=("projected", "gates", "past", "state", "filters", "log_rate", "bias", "weight", "call"),
    outputs=("y", "new_past", "new_state"),
)


class Part(NamedTuple):
    """Where a part of the joined projections begins, and how far apart two key heads are there."""

    first: int
    group: int


class Sizes(NamedTuple):
    """Of a layer, with the places of queries, keys, values, output gates and both gates' logits."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    q: Part
    k: Part
    v: Part
    z: Part
    b: Part
    a: Part

    @property
    def ratio(self) -> int:
        return self.value_heads // self.key_heads


class Weights(NamedTuple):
    """What a layer has beside its matrices."""

    filters: mx.array  # (channels, taps, 1): queries', keys', then values' channels
    log_rate: mx.array  # (value heads,)
    bias: mx.array  # (value heads,)
    norm: mx.array  # (value_dim,)
    eps: float

    def in_float32(self) -> Weights:
        filters, log_rate, bias, norm = (x.astype(mx.float32) for x in self[:4])
        return Weights(filters, log_rate, bias, norm, self.eps)


def in_a_row(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> Sizes:
    """Qwen 3.5: all queries, all keys, all values, then z, b and a."""
    ratio, keys, values = value_heads // key_heads, key_heads * key_dim, value_heads * value_dim
    b = 2 * keys + 2 * values
    return Sizes(
        *(key_heads, value_heads, key_dim, value_dim),
        q=Part(0, key_dim),
        k=Part(keys, key_dim),
        v=Part(2 * keys, ratio * value_dim),
        z=Part(2 * keys + values, ratio * value_dim),
        b=Part(b, ratio),
        a=Part(b + value_heads, ratio),
    )


def by_key_head(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> Sizes:
    """Qwen3-Next: for each key head its query, key, values and z; then for each its b and a."""
    ratio = value_heads // key_heads
    group = 2 * key_dim + 2 * ratio * value_dim
    b = key_heads * group
    return Sizes(
        *(key_heads, value_heads, key_dim, value_dim),
        q=Part(0, group),
        k=Part(key_dim, group),
        v=Part(2 * key_dim, group),
        z=Part(2 * key_dim + ratio * value_dim, group),
        b=Part(b, 2 * ratio),
        a=Part(b + ratio, 2 * ratio),
    )


Results = tuple[mx.array, mx.array, mx.array]


def token(
    parts: Sequence[mx.array], past: mx.array, state: mx.array, weights: Weights, sizes: Sizes
) -> Results:
    """One token of each sequence.

    Args:
        parts: (B, width) each, what the input matrices say, in the order of `sizes`.
        past: (B, taps - 1, channels), what the convolution still needs of tokens before.
        state: (B, value heads, value_dim, key_dim) float32.

    Returns:
        (B, 1, value heads x value_dim) for the output matrix, and the new past and state.
    """
    if [part.shape[-1] for part in parts[:-1]] not in ([], [min(sizes.b.first, sizes.a.first)]):
        parts = [mx.concatenate(list(parts), axis=-1)]
    dtype, like = parts[0].dtype, (*parts, past, weights.filters, weights.norm)
    same = all(x.dtype == dtype for x in like) and state.dtype == mx.float32
    variant = sizes.key_dim, sizes.value_dim, weights.filters.shape[1], dtype
    gates = weights.log_rate.dtype, weights.bias.dtype
    if same and _serves(sizes) and trusted("delta_token", *variant, *gates):
        return stepped(parts, past, state, weights, sizes)
    return stepped_plainly(parts, past, state, weights, sizes)


def _serves(sizes: Sizes) -> bool:
    passes = -(-sizes.value_dim * LANES // THREADS)
    values = passes * sizes.key_dim // LANES
    return sizes.key_dim % (4 * LANES) == 0 and values <= MOST_VALUES


def stepped(
    parts: Sequence[mx.array], past: mx.array, state: mx.array, weights: Weights, sizes: Sizes
) -> Results:
    """`token` by the kernel: all projections in one part, or both gates' logits apart."""
    projected, gates = parts[0], parts[-1]
    (B, width), gates_width, taps = projected.shape, gates.shape[-1], weights.filters.shape[1]
    apart = width if len(parts) == 2 else 0
    in_gates = (part._replace(first=part.first - apart) for part in (sizes.b, sizes.a))
    places = (n for part in (*sizes[4:-2], *in_gates) for n in part)
    widths = width, gates_width
    y, new_past, new_state = DELTA_TOKEN(
        [
            *(projected, gates, past, state, weights.filters),
            *(at_least_8(weights.log_rate), at_least_8(weights.bias), weights.norm),
            struct(sizes.key_heads, sizes.value_heads, *widths, float(weights.eps), *places),
        ],
        template={"DK": sizes.key_dim, "DV": sizes.value_dim, "TAPS": taps},
        blocks=(sizes.value_heads, B, 1),
        threads=THREADS,
        outputs=[
            ((B, 1, sizes.value_heads * sizes.value_dim), projected.dtype),
            (past.shape, past.dtype),
            (state.shape, mx.float32),
        ],
    )
    return y, new_past, new_state


def stepped_plainly(
    parts: Sequence[mx.array], past: mx.array, state: mx.array, weights: Weights, sizes: Sizes
) -> Results:
    """`token` in plain operations."""
    projected = mx.concatenate(list(parts), axis=-1)
    B, dtype = len(projected), projected.dtype
    Hk, Hv, Dk, Dv, ratio = *sizes[:4], sizes.ratio

    def part(of: Part, per_key_head: int) -> mx.array:
        at = of.first + of.group * np.arange(Hk)[:, None] + np.arange(per_key_head)
        return projected[:, mx.array(at.reshape(-1))]

    newest = [part(sizes.q, Dk), part(sizes.k, Dk), part(sizes.v, ratio * Dv)]
    window = mx.concatenate([past, mx.concatenate(newest, axis=-1)[:, None]], axis=1)
    filters = weights.filters[..., 0].astype(mx.float32).T  # (taps, channels)
    mixed = nn.silu((window.astype(mx.float32) * filters).sum(axis=1, keepdims=True))
    q, k, v = mx.split(mixed, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    q, k, v = (x.reshape(B, 1, -1, d) for x, d in ((q, Dk), (k, Dk), (v, Dv)))
    q, k = (x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    a, b = (part(of, ratio)[:, None].astype(mx.float32) for of in (sizes.a, sizes.b))
    rate = mx.exp(weights.log_rate.astype(mx.float32))
    log_g = -rate * nn.softplus(a + weights.bias.astype(mx.float32))
    y, state = gated_delta(q * Dk**-0.5, k, v, log_g, mx.sigmoid(b), state)
    y = mx.fast.rms_norm(y.astype(dtype), weights.norm, weights.eps).astype(mx.float32)
    z = part(sizes.z, ratio * Dv).reshape(B, 1, Hv, Dv).astype(mx.float32)
    return (nn.silu(z) * y).astype(dtype).reshape(B, 1, -1), window[:, 1:], state


@check("delta_token")
def _error(
    key_dim: int, value_dim: int, taps: int, dtype: mx.Dtype, rate: mx.Dtype, bias: mx.Dtype
) -> float:
    """Relative distance of outputs and states from the twin in float32, over some tokens of two
    sequences and both orders of projections, beyond rounding."""
    worst = 0.0
    for order in (in_a_row, by_key_head):
        sizes = order(2, 4, key_dim, value_dim)
        channels, width = 4 * key_dim + 4 * value_dim, sizes.a.first + sizes.a.group * 2
        weights = Weights(
            random(channels, taps, 1, seed=1).astype(dtype),
            random(4, seed=2).astype(rate),
            random(4, seed=3).astype(bias),
            random(value_dim, seed=4).astype(dtype),
            1e-6,
        )
        past = random(2, taps - 1, channels, seed=5).astype(dtype)
        state = random(2, 4, value_dim, key_dim, seed=6)
        for n in range(3):
            projected = random(2, width, seed=7 + n).astype(dtype)
            parts = [mx.contiguous(x) for x in mx.split(projected, [sizes.b.first], axis=-1)]
            got = stepped(parts if n == 1 else [projected], past, state, weights, sizes)
            with mx.stream(mx.cpu):
                inputs = [projected.astype(mx.float32)], past.astype(mx.float32)
                want = stepped_plainly(*inputs, state, weights.in_float32(), sizes)
            worst = max(worst, beyond_rounding(got, want))
            past, state = got[1:]
    return worst
