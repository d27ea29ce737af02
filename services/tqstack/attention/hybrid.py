"""Compressed caches for a whole model: softmax layers compressed, every other entry left alone."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.dispatch import install

EXACT = "none"  # the codec that stores values as they are


def softmax_entries(cache: list[Any]) -> list[int]:
    """Entries of a model's cache that belong to softmax layers with a growing KV cache.

    Only exact `KVCache` objects count: recurrent state, rotating windows and the like stay as the
    model made them.
    """
    return [i for i, entry in enumerate(cache) if type(entry) is KVCache]


def layer_specs(
    count: int, key_spec: str, value_spec: str, boundary_layers: int
) -> list[tuple[str, str]]:
    """Codecs of `count` softmax layers; the first and last `boundary_layers` of them stay exact."""
    return [
        (EXACT, EXACT)
        if min(ordinal, count - 1 - ordinal) < boundary_layers
        else (key_spec, value_spec)
        for ordinal in range(count)
    ]


def make_turboquant_cache(
    model: nn.Module,
    key_spec: str = "tq4",
    value_spec: str | None = None,
    boundary_layers: int = 0,
) -> list[Any]:
    """A cache for `model` whose softmax layers are compressed; works with `mlx_lm.generate`.

    Args:
        key_spec, value_spec: codecs, see `tqstack.turboquant.codec.make_codec`; values as keys if
            None.
        boundary_layers: softmax layers at either end that keep 16 bits; recurrent layers do not
            count.
    """
    install(model)
    cache = make_prompt_cache(model)
    entries = softmax_entries(cache)
    specs = layer_specs(len(entries), key_spec, value_spec or key_spec, boundary_layers)
    for i, (keys, values) in zip(entries, specs, strict=True):
        cache[i] = TurboQuantKVCache(keys, values)
    return cache


def convert_cache_to_turboquant(
    model: nn.Module,
    cache: list[Any],
    key_spec: str = "tq4",
    value_spec: str | None = None,
    boundary_layers: int = 0,
) -> list[Any]:
    """The same context compressed, after an exact prefill. `cache` itself is left as it is."""
    install(model)
    entries = softmax_entries(cache)
    specs = layer_specs(len(entries), key_spec, value_spec or key_spec, boundary_layers)
    converted = list(cache)
    for i, (keys, values) in zip(entries, specs, strict=True):
        converted[i] = TurboQuantKVCache(keys, values)
        if not cache[i].empty():
            converted[i].update_and_fetch(*cache[i].keys_and_values())
    return converted
