"""Attention over a compressed cache in plain mlx operations, one tile of keys at a time.

Packed keys and values are decompressed tile by tile and folded into an online softmax (Milakov and
Gimelshein, arXiv 1805.02867), so neither a decompressed copy of the cache nor a full score matrix
ever exists. That part works in the rotated domain: queries are rotated once, outputs rotated back
once. The exact keys that a query sees are folded into a softmax of their own; both are added up.
It serves wherever no kernel runs, and the kernels are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from tqstack.attention.blocks import BLOCK_TOKENS, Stored, first_exact
from tqstack.attention.kernels.program import gpu_dialect
from tqstack.attention.ragged import ragged_attention, serves
from tqstack.attention.sequences import Mask, one_by_one
from tqstack.attention.softmax import Softmax

# Scores of one step: KEY_TILE keys against QUERY_TILE tokens of every head.
KEY_TILE = 1024


def query_tile(architecture: str) -> int:
    """QUERY_TILE for a GPU: the last letter of an Apple GPU's architecture tells its size, as it
    does MLX's own kernels (p phone, g base and Pro, s Max, d Ultra)."""
    return {"p": 128, "g": 256, "d": 1024}.get(architecture[-1:], 512)


def _query_tile() -> int:
    """On a CPU a block: its queries see no more exact keys than two blocks, and scores stay in its
    caches (512 tokens on none and on 4,096 others: 1.5 to 2 times faster than 512 at once)."""
    if gpu_dialect() is None:
        return BLOCK_TOKENS
    return query_tile(str(mx.device_info().get("architecture", "")))


QUERY_TILE = _query_tile()
# Bytes of scores and tiles that CUDA computes while as many again are queued.
IN_FLIGHT = 32 << 20


def tiled_attention(
    queries: mx.array,
    stored: Stored,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Softmax attention of the newest tokens of some sequences over all that is stored of each.

    Args:
        queries: (B, query heads, L, head_dim); of sequence i the first `stored.counts[i]` columns
            are its last tokens, the others are padding.
        mask: None, "causal", or an array that broadcasts to (B, query heads, L, positions).
        sinks: (query heads,) logits that take part in the softmax and contribute no value.

    Returns:
        (B, query heads, L, value head_dim) in the queries' dtype. A query that sees nothing, and
        padding, gets 0.
    """
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask {mask!r} is not known; allowed: None, 'causal' or an array")
    if not isinstance(mask, mx.array) and serves(stored, queries.shape[2]):
        causal = mask == "causal"
        return ragged_attention(queries, stored, KEY_TILE, scale=scale, causal=causal, sinks=sinks)
    return one_by_one(partial(_sequence, scale=scale, sinks=sinks), queries, stored, mask)


def _sequence(
    queries: mx.array,
    stored: Stored,
    mask: Mask,
    *,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """(1, query heads, L, d) queries of the only sequence -> (1, query heads, L, value d)."""
    _, heads, L, _ = queries.shape
    layout = stored.layout
    kv_heads, value_codec = layout.kv_heads, layout.value_codec
    seen = _Seen(stored, L, mask, (kv_heads, heads // kv_heads))
    raw = queries.astype(mx.float32) * scale
    rotated = layout.key_codec.rotate(raw)
    raw, rotated = (x.reshape(1, kv_heads, heads // kv_heads, L, -1) for x in (raw, rotated))
    spans = [(a, min(a + QUERY_TILE, L)) for a in range(0, L, QUERY_TILE)]
    packed = [Softmax(rotated[..., a:b, :], a, value_codec.dim, None) for a, b in spans]
    _fold_packed(packed, stored, seen)
    outputs = []
    for (a, b), old in zip(spans, packed, strict=True):
        new = Softmax(raw[..., a:b, :], a, value_codec.dim, sinks)
        _fold_exact(new, stored, seen)
        outputs.append(new.plus(old, value_codec.unrotate(old.acc)))
    out = mx.concatenate(outputs, axis=-2) if len(outputs) > 1 else outputs[0]
    return out.reshape(1, heads, L, -1).astype(queries.dtype)


def _fold_packed(blocks: list[Softmax], stored: Stored, seen: _Seen) -> None:
    """All packed keys that the queries see, a tile after the other."""
    layout = stored.layout
    limits = [seen.limit(block.stop - 1) for block in blocks]
    tile = max(1, KEY_TILE // layout.block_tokens) * layout.block_tokens
    started: list[mx.array] = []
    queued, waits = 0, gpu_dialect() == "cuda"
    for start in range(0, max(limits), tile):
        stop = min(start + tile, max(limits))
        visible = [b for b, limit in zip(blocks, limits, strict=True) if limit > start]
        rows = stored.rows(0, start // layout.block_tokens, -(-stop // layout.block_tokens))
        # One tile after the other. Left to itself, MLX runs one chain of a block to its end and
        # keeps the scores of all tiles for the other.
        (rows,) = mx.depends([rows], [x for block in visible for x in (block.acc, block.l)])
        keys, values = layout.planes(rows)
        k, v = layout.key_codec.decode(keys), layout.value_codec.decode(values)
        k, v = k[:, :, : stop - start], v[:, :, : stop - start]
        for block in visible:
            queued += block.fold(k, v, *seen.packed(block, start, stop)) + k.nbytes + v.nbytes
            # On CUDA order is not enough: MLX queues ten batches of a hundred operations there, and
            # holds what they return. Elsewhere nothing is computed here that may not be needed: the
            # last layer's attention, for all tokens of a prompt but the last.
            if waits and queued > IN_FLIGHT:
                waiting, queued = started, 0
                started = [x for b in blocks for x in (b.acc, b.m, b.l)]
                mx.async_eval(started)
                mx.eval(waiting)


def _fold_exact(block: Softmax, stored: Stored, seen: _Seen) -> None:
    """The exact keys that some query of a block sees, in one go: a few hundred."""
    start, stop = seen.limit(block.start), seen.first + block.stop
    stop = stop if seen.causal else seen.first + seen.tokens
    if start < stop:
        first = stored.starts[0]
        k, v = (x[:, :, start - first : stop - first] for x in stored.tail(0))
        k, v = k.astype(mx.float32), v.astype(mx.float32)
        block.fold(k, v, *seen.exact(block, start, stop))


@dataclass(frozen=True)
class _Seen:
    """Which keys the queries of the only sequence see."""

    stored: Stored
    tokens: int  # query tokens
    mask: Mask
    heads: tuple[int, int]  # KV heads, query heads of each

    @property
    def causal(self) -> bool:
        return isinstance(self.mask, str)

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.stored.lengths[0] - self.tokens

    def limit(self, query: int) -> int:
        """Where the exact keys of a query token begin."""
        return self.stored.packed_limit(0, self.first + query)

    def _limits(self, block: Softmax) -> mx.array:
        """(L, 1) `limit` of every query of a block."""
        stored = self.stored
        positions = mx.arange(self.first + block.start, self.first + block.stop)
        limits = first_exact(positions, stored.layout.block_tokens, stored.exact_tokens)
        return mx.maximum(limits, stored.starts[0])[:, None]

    def packed(self, block: Softmax, start: int, stop: int):
        """What `Softmax.fold` needs to know of packed keys at positions start .. stop."""
        seen = None
        if stop > self.limit(block.start):
            seen = mx.arange(start, stop) < self._limits(block)
        return self._masked(block, start, stop, seen)

    def exact(self, block: Softmax, start: int, stop: int):
        """The same of exact keys."""
        keys, seen = mx.arange(start, stop), None
        if self.limit(block.stop - 1) > start:
            seen = keys >= self._limits(block)
        if self.causal and block.stop - block.start > 1:
            queries = mx.arange(self.first + block.start, self.first + block.stop)
            seen = _and(seen, keys <= queries[:, None])
        return self._masked(block, start, stop, seen)

    def _masked(self, block: Softmax, start: int, stop: int, seen: mx.array | None):
        """(bool mask or None, summand or None), each (1, KV heads, groups, L, keys) or less."""
        if self.mask is None or isinstance(self.mask, str):
            return seen, None
        tile = self.mask[..., start:stop]
        tile = tile[..., block.start : block.stop, :] if tile.shape[-2] > 1 else tile
        _, heads, L, S = tile.shape
        tile = tile.reshape(1, *((1, 1) if heads == 1 else self.heads), L, S)
        if tile.dtype == mx.bool_:
            return _and(seen, tile), None
        return seen, tile.astype(mx.float32)


def _and(a: mx.array | None, b: mx.array | None) -> mx.array | None:
    if a is None or b is None:
        return b if a is None else a
    return mx.logical_and(a, b)
