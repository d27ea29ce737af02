"""Attention of a few newest tokens of one or several sequences, in plain mlx operations.

Sequence by sequence a step of four would launch four times as many small operations. Exact tails
are read as they lie, stacked; packed blocks of all sequences are decompressed together, a tile of
each, and the shorter ones drop out on the way. What a tile needs is compiled as one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from tqstack.attention.blocks import BlockLayout, Stored, first_exact, gather
from tqstack.attention.softmax import Softmax
from tqstack.attention.tail import REVOCABLE


def serves(stored: Stored, L: int) -> bool:
    """Whether these are few tokens, of sequences whose tails are one array."""
    return L <= REVOCABLE and isinstance(stored.tail_keys, mx.array)


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
    L, steps = queries.shape[2], _steps(stored.layout, stored.exact_tokens, scale, causal)
    counts = mx.array(stored.counts)
    inputs: list[Any] = [stored.tail_keys, stored.tail_values]
    inputs += [mx.array([stored.starts, stored.lengths]), counts]
    inputs += [] if sinks is None else [sinks]
    rotated, limits, *exact = steps.begin(queries, *inputs)
    packed = _packed(rotated, limits, stored, key_tile, steps.tile)
    out = steps.end(queries, *exact, *(packed.arrays if packed else ()))
    if min(stored.counts) == L:
        return out
    return mx.where(mx.arange(L)[:, None] < counts[:, None, None, None], out, 0)  # padding saw keys


class _Steps:
    """What is compiled, for caches of one kind."""

    def __init__(self, layout: BlockLayout, exact_tokens: int, scale: float, causal: bool):
        self._layout, self._exact_tokens = layout, exact_tokens
        self._scale, self._causal = scale, causal
        self.begin = mx.compile(self._begin)
        self.tile = mx.compile(self._tile)
        self.end = mx.compile(self._end)

    def _begin(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        bounds: mx.array,
        counts: mx.array,
        sinks: mx.array | None = None,
    ) -> tuple[mx.array, ...]:
        """The queries for packed keys, where each one's exact keys begin (B, L), and the softmax
        over those.

        Args:
            keys, values: (B, KV heads, slots, head_dim)
            bounds: (2, B) positions where tails begin, and lengths.
            counts: (B,) tokens that have queries.
        """
        (B, heads, L, _), layout = queries.shape, self._layout
        grouped = (B, layout.kv_heads, heads // layout.kv_heads, L, -1)
        raw = queries.astype(mx.float32) * self._scale
        starts, lengths = bounds[0, :, None], bounds[1, :, None]
        positions = lengths - counts[:, None] + mx.arange(L)  # of padding, behind its sequence
        limits = first_exact(positions, layout.block_tokens, self._exact_tokens)
        limits = mx.maximum(limits, starts)
        last = positions if self._causal or L == 1 else lengths - 1
        slots = (starts + mx.arange(keys.shape[2]))[:, None]  # (B, 1, slots)
        seen = (slots >= limits[..., None]) & (slots <= last[..., None])
        exact = Softmax(raw.reshape(grouped), 0, layout.value_codec.dim, sinks)
        exact.fold(keys.astype(mx.float32), values.astype(mx.float32), seen[:, None, None], None)
        return layout.key_codec.rotate(raw).reshape(grouped), limits, *exact.arrays

    def _tile(
        self, queries: mx.array, rows: mx.array, limits: mx.array, *running: mx.array
    ) -> tuple[mx.array, ...]:
        """The softmax with a tile more.

        Args:
            rows: (sequences x blocks, words)
            limits: (sequences, L) keys of the tile that each query sees.
        """
        layout, sequences = self._layout, queries.shape[0]
        keys, values = layout.planes(rows)
        shape = (layout.kv_heads, sequences, -1)
        k, v = layout.key_codec.decode(keys), layout.value_codec.decode(values)
        k, v = (x.reshape(*shape, x.shape[-1]).swapaxes(0, 1) for x in (k, v))
        softmax = Softmax(queries, 0, layout.value_codec.dim, None)
        if running:
            softmax = Softmax.of(queries, running)
        seen = mx.arange(k.shape[2]) < limits[..., None]  # (sequences, L, T)
        softmax.fold(k, v, seen[:, None, None], None)
        return softmax.arrays

    def _end(self, queries: mx.array, *arrays: mx.array) -> mx.array:
        """Both softmaxes' answer, as queries."""
        B, heads, L, _ = queries.shape
        layout, value_codec = self._layout, self._layout.value_codec
        like = mx.zeros((B, layout.kv_heads, heads // layout.kv_heads, L, 1))
        exact, packed = Softmax.of(like, arrays[:3]), None
        if arrays[3:]:
            packed = Softmax.of(like, arrays[3:])
        out = exact.plus(packed, packed and value_codec.unrotate(packed.acc))
        return out.reshape(B, heads, L, -1).astype(queries.dtype)


_steps = lru_cache(_Steps)


def _packed(
    rotated: mx.array,
    limits: mx.array,
    stored: Stored,
    key_tile: int,
    tile: Callable[..., tuple[mx.array, ...]],
) -> Softmax | None:
    """The softmax over all packed keys that the queries see; None: there are none."""
    block, B = stored.layout.block_tokens, rotated.shape[0]
    needed = [
        -(-stored.packed_limit(i, stored.lengths[i] - 1) // block) if count else 0
        for i, count in enumerate(stored.counts)
    ]
    if not any(needed):
        return None
    order = sorted(range(B), key=lambda i: -needed[i])  # the longest first: others drop out behind
    if order != list(range(B)):
        rotated, limits = rotated[mx.array(order)], limits[mx.array(order)]
    running: Softmax | None = None
    done: list[Softmax] = []
    first, active = 0, B
    while True:
        still = sum(count > first for count in needed)
        if still < active:
            if running is None:  # some see no packed key
                running = Softmax(rotated, 0, stored.layout.value_codec.dim, None)
            done.append(running.take(slice(still, active)))
            running, active = running.take(slice(0, still)), still
            rotated, limits = rotated[:active], limits[:active]
        if not active:
            break
        width = min(max(1, key_tile // (block * active)), max(needed) - first)
        # A sequence that ends within the tile fills it up with a block that it does not see.
        ids = [
            stored.tables[i][min(first + n, needed[i] - 1)]
            for i in order[:active]
            for n in range(width)
        ]
        rows, before = gather(stored.slabs, ids), running.arrays if running else ()
        if before:  # one tile after the other, or all would be held at once
            (rows,) = mx.depends([rows], list(before[1:]))
        arrays = tile(rotated, rows, limits - first * block if first else limits, *before)
        running = Softmax.of(rotated, arrays)
        first += width
    at = sorted(range(B), key=lambda n: order[n])
    return Softmax.joined(done[::-1]).take(at)
