"""Attention over a compressed cache in plain mlx operations, one tile of keys at a time.

Keys and values are decompressed tile by tile and folded into an online softmax (Milakov and
Gimelshein, arXiv 1805.02867), so neither a decompressed copy of the cache nor a full score matrix
ever exists. It works in the rotated domain: queries are rotated once, outputs rotated back once.
This is prefill everywhere, and decode wherever no kernel runs; the kernels are compared with it.
"""

from __future__ import annotations

import mlx.core as mx

from tqstack.attention.kernels.program import backend
from tqstack.turboquant.codec import Codec

# Scores of one step: KEY_TILE keys against QUERY_TILE tokens of every head.
KEY_TILE = 1024


def query_tile(architecture: str) -> int:
    """QUERY_TILE for a GPU: the last letter of an Apple GPU's architecture tells its size, as it
    does MLX's own kernels (p phone, g base and Pro, s Max, d Ultra)."""
    return {"p": 128, "g": 256, "d": 1024}.get(architecture[-1:], 512)


QUERY_TILE = query_tile(str(mx.device_info().get("architecture", "")))
# Bytes of scores and tiles that CUDA computes while as many again are queued.
IN_FLIGHT = 32 << 20
_FLOOR = -1e30  # below every score, and finite: exp(-inf - _FLOOR) is 0, never NaN


def tiled_attention(
    queries: mx.array,
    keys: tuple[mx.array, ...],
    values: tuple[mx.array, ...],
    key_codec: Codec,
    value_codec: Codec,
    *,
    length: int,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    padding: list[int] | None = None,
) -> mx.array:
    """Softmax attention of L queries over `length` stored tokens, the last L of them their own.

    Args:
        queries: (B, query heads, L, head_dim).
        keys, values: planes, each (B, KV heads, capacity >= length, width).
        mask: None, "causal", or an array that broadcasts to (B, query heads, L, length).
        sinks: (query heads,) logits that take part in the softmax and contribute no value.
        padding: tokens to leave out at the start of each sequence.

    Returns:
        (B, query heads, L, value head_dim) in the queries' dtype. A query that sees nothing gets 0.
    """
    B, heads, L, _ = queries.shape
    kv_heads = keys[0].shape[1]
    groups = heads // kv_heads
    causal = isinstance(mask, str)
    if causal and mask != "causal":
        raise ValueError(f"mask {mask!r} is not known; allowed: None, 'causal' or an array")
    array_mask = None if causal else _grouped(mask, kv_heads, groups)
    first = length - L  # position of the first query
    rotated = key_codec.rotate(queries.astype(mx.float32)) * scale
    rotated = rotated.reshape(B, kv_heads, groups, L, -1)
    blocks = [
        _Block(rotated[..., a : a + QUERY_TILE, :], a, value_codec.dim, sinks)
        for a in range(0, L, QUERY_TILE)
    ]
    shared_padding = min(padding) if padding else 0
    started: list[mx.array] = []
    queued, waits = 0, backend() == "cuda"
    for start in range(shared_padding, length, KEY_TILE):
        stop = min(start + KEY_TILE, length)
        visible = [b for b in blocks if not causal or first + b.stop > start]
        tiles = [p[:, :, start:stop] for p in (*keys, *values)]
        # One tile after the other. Left to itself, MLX runs one chain of a block to its end and
        # keeps the scores of all tiles for the other.
        tiles = mx.depends(tiles, [x for block in visible for x in (block.acc, block.l)])
        k = key_codec.decode(tuple(tiles[: len(keys)]))
        v = value_codec.decode(tuple(tiles[len(keys) :]))
        hidden = _padding_mask(padding, start, stop)
        for block in visible:
            seen = hidden
            if causal and first + block.start + 1 < stop:
                seen = _and(
                    seen, _causal_mask(first + block.start, first + block.stop, start, stop)
                )
            bias = None
            if array_mask is not None:
                tile = array_mask[..., block.start : block.stop, start:stop]
                if tile.dtype == mx.bool_:
                    seen = _and(seen, tile)
                else:
                    bias = tile.astype(mx.float32)
            queued += block.fold(k, v, seen, bias) + k.nbytes + v.nbytes
            # On CUDA order is not enough: MLX queues ten batches of a hundred operations there, and
            # holds what they return. Elsewhere nothing is computed here that may not be needed: the
            # last layer's attention, for all tokens of a prompt but the last.
            if waits and queued > IN_FLIGHT:
                waiting, queued = started, 0
                started = [x for b in blocks for x in (b.acc, b.m, b.l)]
                mx.async_eval(started)
                mx.eval(waiting)
    out = mx.concatenate([block.result() for block in blocks], axis=-2)
    out = value_codec.unrotate(out.reshape(B, heads, L, -1))
    return out.astype(queries.dtype)


class _Block:
    """The running softmax of some query tokens: maximum m, denominator l, weighted values acc."""

    def __init__(self, queries: mx.array, start: int, value_dim: int, sinks: mx.array | None):
        B, kv_heads, groups, L, D = queries.shape  # (B, KV heads, groups, L, D), rotated and scaled
        self.start, self.stop = start, start + L
        self.queries = queries.reshape(B, kv_heads, groups * L, D)
        self.shape = (B, kv_heads, groups, L)
        rows = (B, kv_heads, groups * L, 1)
        self.acc = mx.zeros((*rows[:3], value_dim))
        if sinks is None:
            self.m, self.l = mx.full(rows, _FLOOR), mx.zeros(rows)
        else:
            sinks = sinks.astype(mx.float32).reshape(1, kv_heads, groups, 1, 1)
            self.m = mx.broadcast_to(sinks, (*self.shape, 1)).reshape(rows)
            self.l = mx.ones(rows)

    def fold(self, k: mx.array, v: mx.array, seen: mx.array | None, bias: mx.array | None) -> int:
        """Add a tile: k (B, KV heads, T, D), v (B, KV heads, T, Dv); masks broadcast to
        (B, KV heads, groups, L, T). Returns the bytes of its scores."""
        scores = self.queries @ k.swapaxes(-1, -2)  # (B, KV heads, groups * L, T)
        if seen is not None or bias is not None:
            scores = scores.reshape(*self.shape, -1)
            scores = scores if bias is None else scores + bias
            scores = scores if seen is None else mx.where(seen, scores, -mx.inf)
            scores = scores.reshape(*self.queries.shape[:3], -1)
        m = mx.maximum(self.m, scores.max(axis=-1, keepdims=True))
        p = mx.exp(scores - m)
        decay, weighted = mx.exp(self.m - m), p @ v
        self.l = self.l * decay + p.sum(axis=-1, keepdims=True)
        self.acc = self.acc * decay + weighted
        self.m = m
        return p.nbytes

    def result(self) -> mx.array:
        """(B, KV heads, groups, L, Dv)"""
        return (self.acc / mx.maximum(self.l, 1e-30)).reshape(*self.shape, -1)


def _grouped(mask: mx.array | None, kv_heads: int, groups: int) -> mx.array | None:
    """A mask (..., query heads or 1, L, tokens) as (B, KV heads, groups, L, tokens), 1s kept."""
    if mask is None:
        return None
    mask = mask.reshape(*([1] * (4 - mask.ndim)), *mask.shape)
    B, heads, L, S = mask.shape
    return mask.reshape(B, *((1, 1) if heads == 1 else (kv_heads, groups)), L, S)


def _padding_mask(padding: list[int] | None, start: int, stop: int) -> mx.array | None:
    if not padding or max(padding) <= start:
        return None
    pads = mx.array(padding).reshape(-1, 1, 1, 1, 1)
    return mx.arange(start, stop) >= pads


def _causal_mask(query_start: int, query_stop: int, start: int, stop: int) -> mx.array:
    return mx.arange(query_start, query_stop)[:, None] >= mx.arange(start, stop)[None]


def _and(a: mx.array | None, b: mx.array | None) -> mx.array | None:
    if a is None or b is None:
        return b if a is None else a
    return mx.logical_and(a, b)
