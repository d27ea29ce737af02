"""Compressed caches for a whole model: softmax layers compressed, every other entry left alone."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from tqstack.attention.blocks import BLOCK_TOKENS
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.dispatch import install
from tqstack.attention.pool import Pool
from tqstack.attention.table import Table
from tqstack.turboquant.kv_codecs import UNCOMPRESSED, Bits, KVCodecs


def softmax_entries(cache: list[Any]) -> list[int]:
    """Entries of a model's cache that belong to softmax layers with a growing KV cache.

    Only exact `KVCache` objects count: recurrent state, rotating windows and the like stay as the
    model made them.
    """
    return [i for i, entry in enumerate(cache) if type(entry) is KVCache]


def layer_codecs(count: int, codecs: KVCodecs, boundary_layers: int) -> list[KVCodecs]:
    """Codecs of `count` softmax layers: the first and last `boundary_layers` stay in 16 bits."""
    return [
        UNCOMPRESSED if min(ordinal, count - 1 - ordinal) < boundary_layers else codecs
        for ordinal in range(count)
    ]


def make_turboquant_cache(
    model: nn.Module,
    bits: KVCodecs | Bits = 4,
    boundary_layers: int = 0,
    exact_tokens: int = BLOCK_TOKENS,
    pool: Pool | None = None,
) -> list[Any]:
    """A cache for `model` whose softmax layers are compressed; works with `mlx_lm.generate`.

    Args:
        bits: of a value: 4, 3.5, "k4v3", or codecs by name (`KVCodecs.parse`).
        boundary_layers: softmax layers at either end that keep 16 bits; recurrent layers do not
            count.
        exact_tokens: tokens before a query's own block of 128 that it sees exactly: whole blocks;
            0: every token is coded when it comes, as in the paper.
        pool: where blocks come from; None: a pool without limit, shared by all caches of this model
            that are alive and have the same codecs.

    Raises:
        ValueError: there are no such bits or codecs, or exact_tokens is no whole number of blocks.
    """
    plain = make_prompt_cache(model)
    layers = layer_codecs(len(softmax_entries(plain)), KVCodecs.parse(bits), boundary_layers)
    return _compressed(plain, layers, exact_tokens, pool or _shared_pool(model, tuple(layers)))


def convert_cache_to_turboquant(
    cache: list[Any],
    bits: KVCodecs | Bits = 4,
    boundary_layers: int = 0,
    exact_tokens: int = BLOCK_TOKENS,
    pool: Pool | None = None,
) -> list[Any]:
    """The same context compressed, after an exact prefill. `cache` itself is left as it is.

    Args:
        pool: None: one of its own. The others are those of `make_turboquant_cache`.
    """
    layers = layer_codecs(len(softmax_entries(cache)), KVCodecs.parse(bits), boundary_layers)
    return _compressed(cache, layers, exact_tokens, pool or Pool(len(layers)))


def _compressed(
    cache: list[Any], layers: list[KVCodecs], exact_tokens: int, pool: Pool
) -> list[Any]:
    """`cache` with its softmax entries compressed by these codecs, and what they hold."""
    install()
    table, converted = Table(pool), list(cache)
    for layer, (i, codecs) in enumerate(zip(softmax_entries(cache), layers, strict=True)):
        converted[i] = TurboQuantKVCache(codecs, exact_tokens, table, layer)
        if not cache[i].empty():
            converted[i].update_and_fetch(*cache[i].keys_and_values())
    return converted


def _shared_pool(model: nn.Module, layers: tuple[KVCodecs, ...]) -> Pool:
    """The pool of a model's caches. Batches are made of sequences of one pool, without a copy; when
    the last cache is gone, so is the pool."""
    pools = vars(model).get("_pools")
    if pools is None:
        pools = WeakValueDictionary()
        object.__setattr__(model, "_pools", pools)
    return pools.setdefault(layers, Pool(len(layers)))
