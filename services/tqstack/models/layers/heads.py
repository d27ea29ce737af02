"""A softmax layer's single token up to its attention: the launch of `heads.h`, and its twin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from tqstack.attention.kernels.arguments import at_least_8, integers, struct
from tqstack.attention.kernels.program import Program
from tqstack.attention.kernels.trust import beyond_rounding, check, random, trusted
from tqstack.models.layers.residual import Norm

HEADS_PER_BLOCK = 4  # as in heads.h
HEADS = Program(
    name="heads",
    headers=(Path(__file__).with_name("sums.h"), Path(__file__).with_name("heads.h")),
    call="""
heads<D, TURNED>(projected, query_weight, key_weight, positions, (IN(HeadsCall))call, queries, keys,
                 values, tid % 32, block.x * HEADS_PER_BLOCK + tid / 32, block.y);""",
    inputs=("projected", "query_weight", "key_weight", "positions", "call"),
    outputs=("queries", "keys", "values"),
)


class Layout(NamedTuple):
    """Heads of a layer and where they lie in its joined projections: queries `query_stride` apart,
    then keys, then values."""

    query_heads: int
    kv_heads: int
    head_dim: int
    query_stride: int
    turned: int  # dimensions that rotary positions turn
    base: float


Heads = tuple[mx.array, mx.array, mx.array]


def positions_of(offset: int | mx.array) -> mx.array:
    """(8,) or more, those of all sequences first."""
    if isinstance(offset, int):
        return integers(*[offset] * 8)
    return at_least_8(offset.astype(mx.int32))


def heads(
    projected: mx.array, query_norm: Norm, key_norm: Norm, positions: mx.array, layout: Layout
) -> Heads:
    """(B, width) projections and the positions of B tokens -> queries (B, heads, 1, head_dim), keys
    and values (B, KV heads, 1, head_dim)."""
    dtype = projected.dtype
    same = query_norm.weight.dtype == key_norm.weight.dtype == dtype
    serves = layout.head_dim % 32 == 0 == layout.turned % 64 and query_norm.eps == key_norm.eps
    if same and serves and trusted("heads", layout.head_dim, layout.turned, dtype):
        return split(projected, query_norm, key_norm, positions, layout)
    return split_plainly(projected, query_norm, key_norm, positions, layout)


def split(
    projected: mx.array, query_norm: Norm, key_norm: Norm, positions: mx.array, layout: Layout
) -> Heads:
    """`heads` by the kernel."""
    B, width = projected.shape
    Q, K, D = layout[:3]
    queries, keys, values = HEADS(
        [
            *(projected, query_norm.weight, key_norm.weight, positions),
            struct(
                *(Q, K, width, layout.query_stride),
                *(float(query_norm.eps), math.log2(layout.base)),
            ),
        ],
        template={"D": D, "TURNED": layout.turned},
        blocks=(-(-(Q + 2 * K) // HEADS_PER_BLOCK), B, 1),
        threads=32 * HEADS_PER_BLOCK,
        outputs=[((B, n, 1, D), projected.dtype) for n in (Q, K, K)],
    )
    return queries, keys, values


def split_plainly(
    projected: mx.array, query_norm: Norm, key_norm: Norm, positions: mx.array, layout: Layout
) -> Heads:
    """`heads` in plain operations."""
    B = len(projected)
    Q, K, D, stride = layout[:4]
    queries = projected[:, : Q * stride].reshape(B, Q, 1, stride)[..., :D]
    keys, values = mx.split(projected[:, Q * stride :].reshape(B, 2 * K, 1, D), 2, axis=1)

    def turned(x: mx.array) -> mx.array:
        return mx.fast.rope(
            x, layout.turned, traditional=False, base=layout.base, scale=1.0, offset=positions[:B]
        )

    return turned(query_norm(queries)), turned(key_norm(keys)), values


@check("heads")
def _error(head_dim: int, turned: int, dtype: mx.Dtype) -> float:
    """Relative distance of all heads from the twin in float32, beyond rounding twice."""
    layout = Layout(5, 2, head_dim, 2 * head_dim, turned, 1e6)
    width = 5 * 2 * head_dim + 2 * 2 * head_dim
    projected = random(3, width, seed=1).astype(dtype)
    query_norm, key_norm = (Norm(random(head_dim, seed=i).astype(dtype), 1e-6) for i in (2, 3))
    positions = mx.array([0, 7, 4321] + [0] * 5, dtype=mx.int32)
    got = split(projected, query_norm, key_norm, positions, layout)
    with mx.stream(mx.cpu):
        exact = projected.astype(mx.float32), query_norm.in_float32(), key_norm.in_float32()
        want = split_plainly(*exact, positions, layout)
    return beyond_rounding(got, want, 3)
