"""Compressed caches for a whole model: softmax layers compressed, every other entry left alone."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.dispatch import install
from tqstack.attention.specs import Bits

EXACT = "none"  # the codec that stores values as they are


def softmax_entries(cache: list[Any]) -> list[int]:
    """Entries of a model's cache that belong to softmax layers with a growing KV cache.

    Only exact `KVCache` objects count: recurrent state, rotating windows and the like stay as the
    model made them.
    """
    return [i for i, entry in enumerate(cache) if type(entry) is KVCache]


def layer_bits(count: int, bits: Bits, boundary_layers: int) -> list[Bits]:
    """Bits of `count` softmax layers; the first and last `boundary_layers` of them stay exact."""
    return [
        EXACT if min(ordinal, count - 1 - ordinal) < boundary_layers else bits
        for ordinal in range(count)
    ]


def make_turboquant_cache(model: nn.Module, bits: Bits = 4, boundary_layers: int = 0) -> list[Any]:
    """A cache for `model` whose softmax layers are compressed; works with `mlx_lm.generate`.

    Args:
        bits: of a value: 4, 3.5, "k4v3", or codecs by name (`tqstack.attention.specs`).
        boundary_layers: softmax layers at either end that keep 16 bits; recurrent layers do not
            count.
    """
    return convert_cache_to_turboquant(make_prompt_cache(model), bits, boundary_layers)


def convert_cache_to_turboquant(
    cache: list[Any], bits: Bits = 4, boundary_layers: int = 0
) -> list[Any]:
    """The same context compressed, after an exact prefill. `cache` itself is left as it is."""
    install()
    entries = softmax_entries(cache)
    converted = list(cache)
    for i, layer in zip(entries, layer_bits(len(entries), bits, boundary_layers), strict=True):
        converted[i] = TurboQuantKVCache(layer)
        if not cache[i].empty():
            converted[i].update_and_fetch(*cache[i].keys_and_values())
    return converted
