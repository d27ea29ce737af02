"""The models and caches that are compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from tqstack.attention.hybrid import make_turboquant_cache, softmax_entries
from tqstack.turboquant.kv_codecs import Bits, KVCodecs

MakeCache = Callable[[], list[Any]]
ALL: tuple[str, ...] = ("baseline", "mlx_quant", "turboquant")
NAMES = (*ALL, "mlx_lm")


class CachedModel(NamedTuple):
    model: nn.Module
    make_cache: MakeCache


def cached_models(
    names: list[str],
    model: nn.Module,
    bits: KVCodecs | Bits = 4,
    as_installed: Callable[[], nn.Module] | None = None,
) -> dict[str, CachedModel]:
    """A model with these caches: plain ("baseline"), mlx-lm's 4-bit one, compressed. "mlx_lm": with
    the plain one and its layers as mlx-lm makes them, `as_installed`."""

    def quantized() -> list[Any]:
        cache = make_prompt_cache(model)
        for i in softmax_entries(cache):
            cache[i] = QuantizedKVCache(group_size=64, bits=4)
        return cache

    def cached(name: str) -> CachedModel:
        if name == "mlx_lm":
            assert as_installed is not None, "where the model as mlx-lm makes it is to come from"
            plain = as_installed()
            return CachedModel(plain, lambda: make_prompt_cache(plain))
        make: dict[str, MakeCache] = {
            "baseline": lambda: make_prompt_cache(model),
            "mlx_quant": quantized,
            "turboquant": lambda: make_turboquant_cache(model, bits),
        }
        return CachedModel(model, make[name])

    return {name: cached(name) for name in names}
