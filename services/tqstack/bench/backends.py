"""The caches that are compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from tqstack.attention.hybrid import make_turboquant_cache, softmax_entries
from tqstack.turboquant.kv_codecs import Bits, KVCodecs

MakeCache = Callable[[], list[Any]]


def backends(model: nn.Module, name: str, bits: KVCodecs | Bits = 4) -> dict[str, MakeCache]:
    """How each backend makes its cache: plain, mlx-lm's 4-bit one, compressed; or all of them."""

    def quantized() -> list[Any]:
        cache = make_prompt_cache(model)
        for i in softmax_entries(cache):
            cache[i] = QuantizedKVCache(group_size=64, bits=4)
        return cache

    known: dict[str, MakeCache] = {
        "baseline": lambda: make_prompt_cache(model),
        "mlx_quant": quantized,
        "turboquant": lambda: make_turboquant_cache(model, bits),
    }
    return known if name == "all" else {name: known[name]}
