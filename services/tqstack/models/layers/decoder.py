"""Single tokens of Qwen 3.5's and Qwen3-Next's layers in few launches, on GPUs.

A layer's matrices are products as before, but joined; everything between two of them is one
kernel: the recurrence with all around it (`delta_token.py`), heads with norms and positions
(`heads.py`), the choice of experts (`routing.py`), and what adds a result to the residual stream
and normalises that for the next half (`residual.py`). Prompts go through the layers' own code, and
so do tokens with a mask or another cache. States stay in the cache objects of mlx-lm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache

from tqstack.models.layers import delta_token, heads, mixture
from tqstack.models.layers.joined import Joined, join
from tqstack.models.layers.residual import Norm, add

_LAYERS = (qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer)


def install(model: nn.Module) -> int:
    """Let a model's layers step like that; returns how many.

    Install it before what wraps MLPs and recurrent layers (`steps.py`). Weights become constants.
    """
    layers: Any = getattr(model, "layers", [])
    stream, count = Handover(), 0
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if type(layer) not in _LAYERS:
            continue
        next_norm = None
        if following is not None and isinstance(following, _LAYERS):
            next_norm = norm_of(following.input_layernorm)
        step = _step_of(layer, mixture.half_of(layer.mlp), next_norm, stream)
        if step is not None:
            layer.__class__ = _stepping(type(layer))
            layer.step = step
            count += 1
    return count


@lru_cache
def _stepping(base: type[nn.Module]) -> type[nn.Module]:
    class Stepping(base):
        step: _Step

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            if x.shape[1] == 1 and self.step.serves(x, mask, cache):
                return self.step(x, mask, cache)
            return super().__call__(x, mask, cache)

    return Stepping


class Handover:
    """What a layer gives to the next one beside its result: that, normalised."""

    def __init__(self) -> None:
        self._held: tuple[mx.array, mx.array] | None = None

    def give(self, x: mx.array, normed: mx.array | None) -> mx.array:
        self._held = None if normed is None else (x, normed)
        return x

    def take(self, x: mx.array, norm: Norm) -> mx.array:
        """The norm of x: handed over, if it is the very same x."""
        held, self._held = self._held, None
        return held[1] if held is not None and held[0] is x else norm(x)


class _Step:
    """What both kinds of layers have: their ends."""

    def __init__(self, layer: Any, half: mixture.Half, next_norm: Norm | None, stream: Handover):
        self.norm = norm_of(layer.input_layernorm)
        self.middle = norm_of(layer.post_attention_layernorm)
        self.half, self.next_norm, self.stream = half, next_norm, stream

    def serves(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether a token (B, 1, width) with this mask and cache can go this way."""
        raise NotImplementedError

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        raise NotImplementedError

    def finish(self, x: mx.array, mixed: mx.array) -> tuple[mx.array, mx.array | None]:
        """The residual stream and what attention adds to it -> the layer's result, and its norm for
        the next one."""
        x, normed = add(x, mixed, None, self.middle)
        assert normed is not None
        return add(x, *self.half(normed), self.next_norm)


class RecurrentStep(_Step):
    """A Gated DeltaNet layer."""

    def __init__(self, layer: Any, joined: Joined, sizes: delta_token.Sizes, *ends: Any):
        super().__init__(layer, *ends)
        mixer = layer.linear_attn
        self.joined, self.sizes, self.out = joined, sizes, mixer.out_proj
        self.weights = delta_token.Weights(
            *(mixer.conv1d.weight, mixer.A_log, mixer.dt_bias, mixer.norm.weight, mixer.norm.eps)
        )
        self._compiled = mx.compile(self._step)

    def serves(self, x: mx.array, mask: Any, cache: Any) -> bool:
        return mask is None and type(cache) is ArraysCache and not cache.empty()

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        normed = self.stream.take(x, self.norm)
        out, normed, *cache.cache = self._compiled(x, normed, *cache.cache)
        cache.advance(1)
        return self.stream.give(out, normed)

    def _step(self, x: mx.array, normed: mx.array, past: mx.array, state: mx.array):
        projected = self.joined(normed)[:, 0]
        y, past, state = delta_token.token(projected, past, state, self.weights, self.sizes)
        return *self.finish(x, self.out(y)), past, state


class SoftmaxStep(_Step):
    """A layer of softmax attention with an output gate. Attention itself stays outside what is
    compiled: its cache changes shape."""

    def __init__(self, layer: Any, joined: Joined, layout: heads.Layout, *ends: Any):
        super().__init__(layer, *ends)
        attention = layer.self_attn
        self.joined, self.layout, self.out = joined, layout, attention.o_proj
        self.scale = attention.scale
        self.norms = norm_of(attention.q_norm), norm_of(attention.k_norm)
        self._compiled = mx.compile(self._begin), mx.compile(self._end)

    def serves(self, x: mx.array, mask: Any, cache: Any) -> bool:
        return hasattr(cache, "update_and_fetch") and hasattr(cache, "offset")

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        begin, end = self._compiled
        positions = heads.positions_of(cache.offset)
        queries, keys, values, gate = begin(self.stream.take(x, self.norm), positions)
        found = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, *found, cache=cache, scale=self.scale, mask=mask)
        return self.stream.give(*end(x, y, gate))

    def _begin(self, normed: mx.array, positions: mx.array) -> tuple[mx.array, ...]:
        projected, (Q, _, D, stride) = self.joined(normed)[:, 0], self.layout[:4]
        gate = projected[:, : Q * stride].reshape(-1, Q, 1, stride)[..., D:]
        return *heads.heads(projected, *self.norms, positions, self.layout), gate

    def _end(self, x: mx.array, y: mx.array, gate: mx.array):
        y = (y * mx.sigmoid(gate)).reshape(*x.shape[:2], -1)
        return self.finish(x, self.out(y))


def norm_of(module: Any) -> Norm:
    return Norm(module.weight, module.eps)


def _step_of(layer: Any, *ends: Any) -> _Step | None:
    """None: its parts are not such that they could be joined."""
    if not layer.is_linear:
        layout = _layout(layer.self_attn)
        parts = [layer.self_attn[name] for name in ("q_proj", "k_proj", "v_proj")]
        joined = layout and join(parts)
        return SoftmaxStep(layer, joined, layout, *ends) if layout and joined else None
    mixer = layer.linear_attn
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    in_a_row = all(name in mixer for name in names)
    order = delta_token.in_a_row if in_a_row else delta_token.by_key_head
    if getattr(mixer, "sharding_group", None) is not None or "bias" in mixer.conv1d:
        return None
    joined = join([mixer[name] for name in (names if in_a_row else ("in_proj_qkvz", "in_proj_ba"))])
    sizes = order(mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
    return RecurrentStep(layer, joined, sizes, *ends) if joined else None


def _layout(attention: Any) -> heads.Layout | None:
    """None: its positions are not plain rotary ones."""
    rope, Q, D = attention.rope, attention.num_attention_heads, attention.head_dim
    if type(rope) is not nn.RoPE or rope.traditional or rope.scale != 1:
        return None
    return heads.Layout(Q, attention.num_key_value_heads, D, 2 * D, rope.dims, rope.base)
