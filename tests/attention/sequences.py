"""Random keys and values in compressed caches, and what attention over them must give."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.pool import Pool
from tqstack.attention.table import Table

HEADS, DIM = 2, 64
CODECS = ["tq4", "tq3", "tcq2-l8", "none"]


def random_tokens(rng, n, batch=1, heads=HEADS, dim=DIM):
    """Keys and values (batch, heads, n, dim)."""
    return [mx.array(rng.normal(size=(batch, heads, n, dim)).astype(np.float32)) for _ in "kv"]


def new_cache(codecs="tq4", exact_tokens=16, block_tokens=16, layers=1, pool=None):
    """The caches of all layers of a sequence."""
    table = Table(pool or Pool(layers, block_tokens=block_tokens))
    return [TurboQuantKVCache(codecs, exact_tokens, table, i) for i in range(table.pool.layers)]


def visible(cache, i=0):
    """Keys and values of sequence i as each of its positions is stored: (positions, packed keys,
    packed values, exact keys, exact values), NaN where there is none; heads first, float64."""
    layout, length = cache.layout, cache.lengths[i]
    shape = (layout.kv_heads, length)
    packed = [np.full((*shape, c.dim), np.nan) for c in (layout.key_codec, layout.value_codec)]
    ids = cache.tables[i].ids[: cache.packed[i]]
    if ids:
        codecs = layout.key_codec, layout.value_codec
        planes = layout.planes(cache.pool.read(cache.layer, ids))
        for store, codec, own in zip(packed, codecs, planes, strict=True):
            decoded = np.array(codec.unrotate(codec.decode(own))[0], np.float64)
            store[:, : decoded.shape[1]] = decoded[:, :length]
    exact = [np.full_like(x, np.nan) for x in packed]
    start, part = cache.tails.starts[i], cache.tails.part(i)
    if part is not None:
        for store, x in zip(exact, part, strict=True):
            store[:, start:] = np.array(x[0, :, : length - start].astype(mx.float32), np.float64)
    return (*packed, *exact)


def words(cache, i=0):
    """The packed blocks of a sequence, bit for bit."""
    ids = cache.tables[i].ids[: cache.packed[i]]
    return np.array(cache.pool.read(cache.layer, ids)) if ids else None


def same(a, b, i=0, j=0):
    """Whether sequence i of one cache and j of another hold the same bits, as far as a later token
    sees them."""
    seen = a._exact_from(a.lengths[i])
    return (
        (a.lengths[i], a.packed[i]) == (b.lengths[j], b.packed[j])
        and np.array_equal(words(a, i), words(b, j))
        and all(
            np.array_equal(x[:, seen:], y[:, seen:])
            for x, y in zip(visible(a, i)[2:], visible(b, j)[2:], strict=True)
        )
    )


def reference(queries, cache, scale, mask, sinks=None, i=0):
    """Float64 attention of the last L tokens of sequence i, by the rule: a query's own block and
    the `exact_tokens` before it are exact, everything older is packed.

    queries: (query heads, L, dim). mask: bool, or a summand, (query heads, L, positions).
    """
    reading = cache._reading
    block = cache.pool.block_tokens
    packed_k, packed_v, exact_k, exact_v = visible(cache, i)
    if reading is not None:  # the prompt's chunk is still there
        start = reading.starts[i]
        for store, x in zip((exact_k, exact_v), reading.tail(i), strict=True):
            own = np.array(x[0].astype(mx.float32), np.float64)
            store[:, start:] = own[:, : store.shape[1] - start]
    heads, L, _ = queries.shape
    groups, length = heads // packed_k.shape[0], cache.lengths[i]
    out = np.zeros((heads, L, packed_v.shape[2]))
    for h in range(heads):
        for t in range(L):
            p = length - L + t
            limit = max(p // block * block - cache.exact_tokens, 0)
            if reading is not None:
                limit = max(limit, reading.starts[i])
            where = (np.arange(length) >= limit)[:, None]
            k = np.where(where, exact_k[h // groups], packed_k[h // groups])
            v = np.where(where, exact_v[h // groups], packed_v[h // groups])
            row = mask[h, t]
            seen = row if row.dtype == bool else row > -1e30
            if not seen.any():
                continue
            scores = k[seen] @ np.array(queries[h, t], np.float64) * scale
            if row.dtype != bool:
                scores = scores + row[seen]
            top = max(scores.max(), -1e30 if sinks is None else float(sinks[h]))
            w = np.exp(scores - top)
            total = w.sum() + (0 if sinks is None else np.exp(float(sinks[h]) - top))
            out[h, t] = w @ v[seen] / total
    return out


def causal(heads, L, length):
    rows = np.arange(length) <= np.arange(length - L, length)[:, None]
    return np.broadcast_to(rows, (heads, L, length))


def relative_error(out, expected):
    out = np.array(out.astype(mx.float32), np.float64)
    return np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30)
