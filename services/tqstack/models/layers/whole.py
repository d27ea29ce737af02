"""A few tokens of Qwen 3.5's and Qwen3-Next's layers on a CPU: all that a layer does between two
reads of a cache is compiled as one.

MLX takes some microseconds for each operation, however small, and a token of the embedded model is
a thousand of them. Traced together, norms, rotary positions and sums of the residual stream are
fused with what is around them. Attention stays outside: its cache changes shape. Prompts go through
the layers' own code, and so do tokens with a mask or another cache.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.models.layers.drafts import MOST_TOKENS, Revocable, accepted, several, single

_LAYERS = (qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer)


def install(model: nn.Module) -> int:
    """Let a model's layers step like that; returns how many.

    Weights become constants of the trace: a model whose weights change must not be installed.
    """
    layers: Any = [layer for layer in getattr(model, "layers", []) if type(layer) in _LAYERS]
    for layer in layers:
        layer.__class__ = _whole(type(layer))
        names = ("_several", "_single") if layer.is_linear else ("_begin", "_end")
        layer._compiled = [mx.compile(getattr(layer, name)) for name in names]
    return len(layers)


@lru_cache
def _whole(base: type[nn.Module]) -> Any:
    class Whole(base):
        _compiled: list[Any]
        linear_attn: Any
        self_attn: Any
        mlp: Any
        input_layernorm: Any
        post_attention_layernorm: Any

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if x.shape[1] > MOST_TOKENS:
                return super().__call__(x, mask, cache)
            if self.is_linear and type(cache) is Revocable:
                past, state = cache.past
                y, held = self._compiled[0](x, past, state)
                cache.behind = partial(accepted, state, *held)
                return y
            if self.is_linear and type(cache) is ArraysCache:
                if x.shape[1] == 1 and mask is None and not cache.empty():
                    y, *cache.cache = self._compiled[1](x, *cache.cache)
                    cache.advance(1)
                    return y
            elif type(cache) is TurboQuantKVCache and not isinstance(mask, mx.array):
                queries, gates, found = self.store(x, cache)
                scale, end = self.self_attn.scale, self._compiled[1]
                y = scaled_dot_product_attention(
                    queries, *found, cache=cache, scale=scale, mask=mask
                )
                return end(x, y, gates)
            return super().__call__(x, mask, cache)

        def store(self, x: mx.array, cache: TurboQuantKVCache) -> tuple[mx.array, mx.array, Any]:
            """Put a few tokens' keys and values into the cache. Their queries, the gates of what is
            answered, and what attention reads."""
            offsets = mx.array(cache.offset).reshape(-1)
            queries, keys, values, gates = self._compiled[0](x, offsets)
            return queries, gates, cache.update_and_fetch(keys, values)

        def _several(self, x: mx.array, past: mx.array, state: mx.array):
            mixed, held = several(self.linear_attn, self.input_layernorm(x), past, state)
            return self._finish(x, mixed), held

        def _single(self, x: mx.array, past: mx.array, state: mx.array):
            mixed, *after = single(self.linear_attn, self.input_layernorm(x), past, state)
            return self._finish(x, mixed), *after

        def _begin(self, x: mx.array, offsets: mx.array) -> tuple[mx.array, ...]:
            """(B, L, width) behind (B,) tokens -> (B, heads, L, D) queries, keys and values, and
            the answers' gates (B, heads, L, D)."""
            attention, (B, L, _) = self.self_attn, x.shape
            x = self.input_layernorm(x)
            shape = B, L, attention.num_attention_heads, -1
            queries, gates = mx.split(attention.q_proj(x).reshape(shape), 2, axis=-1)
            shape = B, L, attention.num_key_value_heads, -1
            keys, values = (part(x).reshape(shape) for part in (attention.k_proj, attention.v_proj))
            both = mx.concatenate([attention.q_norm(queries), attention.k_norm(keys)], axis=2)
            both = attention.rope(both.swapaxes(1, 2), offset=offsets)
            queries, keys = mx.split(both, [attention.num_attention_heads], axis=1)
            return queries, keys, values.swapaxes(1, 2), gates.swapaxes(1, 2)

        def _end(self, x: mx.array, y: mx.array, gates: mx.array) -> mx.array:
            y = (y * mx.sigmoid(gates)).swapaxes(1, 2)
            return self._finish(x, self.self_attn.o_proj(y.reshape(*x.shape[:2], -1)))

        def _finish(self, x: mx.array, mixed: mx.array) -> mx.array:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x))

    return Whole
