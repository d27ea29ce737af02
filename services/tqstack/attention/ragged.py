"""Attention of several sequences' newest tokens at once, in plain mlx operations.

Sequence by sequence a step of four would launch four times as many small operations. Exact tails
are read as they lie, stacked; packed blocks of all sequences are decompressed together, a tile of
each, and the shorter ones drop out on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from tqstack.attention.blocks import Stored, first_exact, gather
from tqstack.attention.softmax import Softmax
from tqstack.attention.tail import REVOCABLE


def serves(stored: Stored, L: int) -> bool:
    """Whether these are few tokens of several sequences, whose tails are one array."""
    return L <= REVOCABLE and len(stored.counts) > 1 and isinstance(stored.tail_keys, mx.array)


def ragged_attention(
    queries: mx.array,
    stored: Stored,
    key_tile: int,
    *,
    scale: float,
    causal: bool,
    sinks: mx.array | None = None,
) -> mx.array:
    """`tiled_attention` of a few tokens of each sequence.

    Args:
        key_tile: packed keys that are decompressed at once, of all sequences together.
        causal: whether a token sees those behind it that came with it.
    """
    B, heads, L, _ = queries.shape
    layout, value_codec = stored.layout, stored.layout.value_codec
    grouped = (B, layout.kv_heads, heads // layout.kv_heads, L, -1)
    raw = queries.astype(mx.float32) * scale
    rotated = layout.key_codec.rotate(raw).reshape(grouped)
    exact = Softmax(raw.reshape(grouped), 0, value_codec.dim, sinks)
    keys, values = (x.astype(mx.float32) for x in (stored.tail_keys, stored.tail_values))  # pyright: ignore
    exact.fold(keys, values, _seen(stored, L, causal), None)
    packed = _packed(rotated, stored, key_tile)
    out = exact.plus(packed, packed and value_codec.unrotate(packed.acc))
    out = out.reshape(B, heads, L, -1).astype(queries.dtype)
    if min(stored.counts) == L:
        return out
    tokens = mx.arange(L)[:, None] < mx.array(stored.counts)[:, None, None, None]
    return mx.where(tokens, out, 0)  # padding saw packed keys


def _positions(stored: Stored, L: int) -> mx.array:
    """(B, L) of the queries; of padding, behind its sequence."""
    first = mx.array([n - count for n, count in zip(stored.lengths, stored.counts, strict=True)])
    return first[:, None] + mx.arange(L)


def _limits(stored: Stored, L: int) -> mx.array:
    """(B, L) where the exact keys of each query begin."""
    exact = first_exact(_positions(stored, L), stored.layout.block_tokens, stored.exact_tokens)
    return mx.maximum(exact, mx.array(stored.starts)[:, None])


def _seen(stored: Stored, L: int, causal: bool) -> mx.array:
    """(B, 1, 1, L, slots) bool: which of the exact keys each query sees."""
    starts, lengths = (mx.array(x)[:, None, None] for x in (stored.starts, stored.lengths))
    keys = starts + mx.arange(stored.tail_keys.shape[2])  # pyright: ignore  (B, 1, slots)
    queries = _positions(stored, L)[..., None]  # (B, L, 1)
    last = queries if causal or L == 1 else lengths - 1
    seen = (keys >= _limits(stored, L)[..., None]) & (keys <= last)
    return seen[:, None, None]


def _packed(rotated: mx.array, stored: Stored, key_tile: int) -> Softmax | None:
    """The softmax over all packed keys that the queries see; None: there are none."""
    layout, (B, _, _, L, _) = stored.layout, rotated.shape
    block = layout.block_tokens
    needed = [
        -(-stored.packed_limit(i, stored.lengths[i] - 1) // block) if count else 0
        for i, count in enumerate(stored.counts)
    ]
    if not any(needed):
        return None
    order = sorted(range(B), key=lambda i: -needed[i])  # the longest first: others drop out behind
    limits = _limits(stored, L)[mx.array(order)] if L > 1 else None
    running = Softmax(rotated, 0, layout.value_codec.dim, None).take(order)
    done: list[Softmax] = []
    first, active = 0, B
    while True:
        still = sum(count > first for count in needed)
        if still < active:
            done.append(running.take(slice(still, active)))
            running, active = running.take(slice(0, still)), still
        if not active:
            break
        width = min(max(1, key_tile // (block * active)), max(needed) - first)
        rows = order[:active]
        # A sequence that ends within the tile fills it up with a block that it does not see.
        ids = [stored.tables[i][min(first + n, needed[i] - 1)] for i in rows for n in range(width)]
        stops = mx.array([needed[i] * block for i in rows])[:, None]  # (active, 1)
        keys = mx.arange(first * block, (first + width) * block)
        visible = None
        if limits is not None or any(needed[i] < first + width for i in rows):
            stops = stops if limits is None else limits[:active]
            visible = (keys < stops[..., None])[:, None, None]  # (active, 1, 1, L or 1, T)
        k, v = _decoded(running, stored, ids, active)
        running.fold(k, v, visible, None)
        first += width
    at = sorted(range(B), key=lambda n: order[n])
    return Softmax.joined(done[::-1]).take(at)


def _decoded(
    running: Softmax, stored: Stored, ids: Sequence[int], sequences: int
) -> tuple[mx.array, mx.array]:
    """Blocks of some sequences -> keys and values (sequences, KV heads, T, head_dim)."""
    layout = stored.layout
    # One tile after the other, or all would be held at once.
    (rows,) = mx.depends([gather(stored.slabs, ids)], [running.acc, running.l])
    keys, values = layout.planes(rows)
    shape = (layout.kv_heads, sequences, -1)
    k, v = layout.key_codec.decode(keys), layout.value_codec.decode(values)
    k, v = (x.reshape(*shape, x.shape[-1]).swapaxes(0, 1) for x in (k, v))
    return k, v
