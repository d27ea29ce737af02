"""How layers are stepped through: a few tokens compiled, and on a GPU prompts a layer at a time.

A token of a 40-layer model is some 2,000 small operations, and making and launching them takes
longer than the GPU needs for them; a CPU waits meanwhile. `mx.compile` traces them once and fuses
what it can. Attention stays outside: its cache changes shape. The layers' own code is what is
traced, so there is nothing here that could differ from it.

A prompt's operations are large, and on CUDA MLX queues a thousand of them and holds what they all
return: there MLPs and recurrent layers wait for the one before.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from tqstack.attention.kernels.program import gpu_dialect
from tqstack.models.layers.drafts import MOST_TOKENS, Revocable, accepted, several

PROMPT = 256  # tokens from which on waiting costs nothing that could be seen


def install(model: nn.Module) -> int:
    """Let a model's MLPs and Gated DeltaNet layers step like that; returns how many.

    Weights become constants of the trace: a model whose weights change must not be installed.
    """
    count = 0
    layers: Any = model.layers
    for layer in layers:
        for name, faster in (("mlp", _mlp), ("linear_attn", _recurrence)):
            module = layer.get(name)
            if isinstance(module, nn.Module) and not getattr(type(module), "steps", False):
                module.__class__ = faster(type(module))
                count += 1
    return count


_started: list[mx.array] = []


def _wait_behind(results: list[Any]) -> None:
    """Start what half a layer returns, and wait for the half before: the GPU is never idle, and
    what exists in between is that of two halves."""
    mx.async_eval(results)
    mx.eval(_started)
    _started[:] = results


@lru_cache
def _mlp(base: type[nn.Module]) -> type[nn.Module]:
    class Steps(base):
        steps = True

        def __call__(self, x: mx.array) -> mx.array:
            if x.shape[1] > MOST_TOKENS:
                y = super().__call__(x)
                if x.shape[1] >= PROMPT and gpu_dialect() == "cuda":
                    _wait_behind([y])
                return y
            if not hasattr(self, "_few_tokens"):
                self._few_tokens = mx.compile(super().__call__)
            return self._few_tokens(x)

    return Steps


@lru_cache
def _recurrence(base: type[nn.Module]) -> type[nn.Module]:
    class Steps(base):
        steps = True

        def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None):
            if type(cache) is Revocable:
                return self._revocably(x, cache)
            ready = type(cache) is ArraysCache and not cache.empty()
            if x.shape[1] != 1 or mask is not None or not ready:
                y = super().__call__(x, mask, cache)
                if x.shape[1] >= PROMPT and cache is not None and gpu_dialect() == "cuda":
                    _wait_behind([y, *cache.cache])
                return y
            if not hasattr(self, "_single_token"):
                self._single_token = mx.compile(self._step)
            y, *cache.cache = self._single_token(x, *cache.cache)
            return y

        def _revocably(self, x: mx.array, cache: Revocable) -> mx.array:
            if not hasattr(self, "_few_tokens"):
                self._few_tokens = mx.compile(partial(several, self))
            past, state = cache.past
            y, held = self._few_tokens(x, past, state)
            cache.behind = partial(accepted, state, *held)
            return y

        def _step(self, x: mx.array, *state: Any) -> tuple[Any, ...]:
            cache = ArraysCache(len(state))
            cache.cache = list(state)
            y = super().__call__(x, None, cache)
            return y, *cache.cache

    return Steps
