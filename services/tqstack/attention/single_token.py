"""One token through a layer in fewer steps: what lies between two growing caches, compiled.

A token of a 40-layer model is some 2,000 small operations, and making and launching them takes
longer than the GPU needs for them. `mx.compile` traces them once and fuses what it can. Attention
stays outside: its cache changes shape. The layers' own code is what is traced, so there is nothing
here that could differ from it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache


def install(model: nn.Module) -> int:
    """Compile the single-token step of a model's MLPs and Gated DeltaNet layers; returns how many.

    Weights become constants of the trace: a model whose weights change must not be installed.
    """
    count = 0
    layers: Any = model.layers
    for layer in layers:
        for name, faster in (("mlp", _mlp), ("linear_attn", _recurrence)):
            module = layer.get(name)
            if isinstance(module, nn.Module):
                module.__class__ = faster(type(module))
                count += 1
    return count


@lru_cache
def _mlp(base: type[nn.Module]) -> type[nn.Module]:
    class SingleToken(base):
        def __call__(self, x: mx.array) -> mx.array:
            if x.shape[1] != 1:
                return super().__call__(x)
            if not hasattr(self, "_single_token"):
                self._single_token = mx.compile(super().__call__)
            return self._single_token(x)

    return SingleToken


@lru_cache
def _recurrence(base: type[nn.Module]) -> type[nn.Module]:
    class SingleToken(base):
        def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None):
            ready = type(cache) is ArraysCache and not cache.empty()
            if x.shape[1] != 1 or mask is not None or not ready:
                return super().__call__(x, mask, cache)
            if not hasattr(self, "_single_token"):
                self._single_token = mx.compile(self._step)
            y, *cache.cache = self._single_token(x, *cache.cache)
            return y

        def _step(self, x: mx.array, *state: Any) -> tuple[Any, ...]:
            cache = ArraysCache(len(state))
            cache.cache = list(state)
            y = super().__call__(x, None, cache)
            return y, *cache.cache

    return SingleToken
