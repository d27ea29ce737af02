"""Single tokens of Qwen 3's, 3.5's and Qwen3-Next's layers in few launches, on GPUs.

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
from mlx_lm.models import qwen3, qwen3_5, qwen3_next
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache

from tqstack.models.layers import delta_token, heads, mixture
from tqstack.models.layers.joined import AnyJoined, Projections, join, project
from tqstack.models.layers.residual import Norm, Normed, add
from tqstack.weights.kernels.rotate import rotated_answers

_LAYERS = (qwen3_5.DecoderLayer, qwen3_next.Qwen3NextDecoderLayer, qwen3.TransformerBlock)


def install(model: nn.Module) -> int:
    """Let a model's layers step like that; returns how many.

    Install it before what wraps MLPs and recurrent layers (`steps.py`). Weights become constants.
    """
    layers: Any = getattr(model, "layers", [])
    stream = Handover()
    steps = [_step_of(layer, stream) if type(layer) in _LAYERS else None for layer in layers]
    for layer, step, following in zip(layers, steps, [*steps[1:], None], strict=True):
        if step is not None:
            step.next_norm = following and following.norm
            layer.__class__ = _stepping(type(layer))
            layer.step = step
    return sum(step is not None for step in steps)


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
        self._held: tuple[mx.array, tuple[mx.array, ...]] | None = None

    def give(self, x: mx.array, normed: tuple[mx.array, ...] | None) -> mx.array:
        self._held = None if normed is None else (x, normed)
        return x

    def take(self, x: mx.array, norm: Norm) -> tuple[mx.array, ...]:
        """The norm of x: handed over, if it is the very same x."""
        held, self._held = self._held, None
        return held[1] if held is not None and held[0] is x else norm.read(x).arrays


class _Step:
    """What both kinds of layers have: their ends."""

    next_norm: Norm | None = None

    def __init__(self, layer: Any, projections: Projections, out: AnyJoined, stream: Handover):
        self.projections, self.out, self.stream = projections, out, stream
        self.half = mixture.half_of(layer.mlp)
        self.norm = norm_of(layer.input_layernorm, projections.seed)
        self.middle = norm_of(layer.post_attention_layernorm, self.half.seed)

    def serves(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether a token (B, 1, width) with this mask and cache can go this way."""
        raise NotImplementedError

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        raise NotImplementedError

    def finish(self, x: mx.array, mixed: mx.array) -> tuple[mx.array, tuple[mx.array, ...] | None]:
        """The residual stream and what attention adds to it -> the layer's result, and its norm for
        the next one."""
        x, normed = add(x, mixed, None, self.middle)
        assert normed is not None
        x, normed = add(x, *self.half(normed), self.next_norm)
        return x, normed and normed.arrays


class RecurrentStep(_Step):
    """A Gated DeltaNet layer."""

    def __init__(self, layer: Any, sizes: delta_token.Sizes, *ends: Any):
        super().__init__(layer, *ends)
        mixer = layer.linear_attn
        self.sizes = sizes
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

    def _step(self, x: mx.array, normed: tuple[mx.array, ...], past: mx.array, state: mx.array):
        parts = [part[:, 0] for part in self.projections.apart(Normed.of(*normed))]
        y, past, state = delta_token.token(parts, past, state, self.weights, self.sizes)
        return *self.finish(x, self.out(Normed(y))), past, state


class SoftmaxStep(_Step):
    """A layer of softmax attention, with an output gate or without. Attention itself stays outside
    what is compiled: its cache changes shape."""

    def __init__(self, layer: Any, layout: heads.Layout, *ends: Any):
        super().__init__(layer, *ends)
        attention = layer.self_attn
        self.layout, self.scale = layout, attention.scale
        self.norms = norm_of(attention.q_norm), norm_of(attention.k_norm)
        self._compiled = mx.compile(self._begin), mx.compile(self._end)

    def serves(self, x: mx.array, mask: Any, cache: Any) -> bool:
        return hasattr(cache, "update_and_fetch") and hasattr(cache, "offset")

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        begin, end = self._compiled
        positions = heads.positions_of(cache.offset)
        queries, keys, values, gates = begin(self.stream.take(x, self.norm), positions)
        found = cache.update_and_fetch(keys, values)
        y = scaled_dot_product_attention(queries, *found, cache=cache, scale=self.scale, mask=mask)
        return self.stream.give(*end(x, y, gates))

    def _begin(self, normed: tuple[mx.array, ...], positions: mx.array) -> tuple[mx.array, ...]:
        projected = self.projections(Normed.of(*normed))[:, 0]
        return *heads.heads(projected, *self.norms, positions, self.layout), projected

    def _end(self, x: mx.array, y: mx.array, projected: mx.array):
        return self.finish(x, self.out(self._gated(y, projected)))

    def _gated(self, y: mx.array, projected: mx.array) -> Normed:
        """Attention's answers (B, heads, 1, D), times their gates where there are any."""
        (Q, _, D, stride), seed = self.layout[:4], self.out.seed
        if stride > D and seed is not None:
            return Normed(y, rotated_answers(y, projected, stride, seed))
        if stride > D:
            y = y * mx.sigmoid(projected[:, : Q * stride].reshape(-1, Q, 1, stride)[..., D:])
        return Normed(y.reshape(len(y), 1, -1))


def norm_of(module: Any, seed: int | None = None) -> Norm:
    return Norm(module.weight, module.eps, seed)


def _step_of(layer: Any, stream: Handover) -> _Step | None:
    """None: its parts are not such that they could be joined."""
    if not getattr(layer, "is_linear", False):
        attention = layer.self_attn
        layout, out = _layout(attention), join([attention.o_proj])
        if not layout or not out:
            return None
        joined = project([attention[name] for name in ("q_proj", "k_proj", "v_proj")])
        return SoftmaxStep(layer, layout, joined, out, stream) if joined else None
    mixer = layer.linear_attn
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    in_a_row = all(name in mixer for name in names)
    order = delta_token.in_a_row if in_a_row else delta_token.by_key_head
    if getattr(mixer, "sharding_group", None) is not None or "bias" in mixer.conv1d:
        return None
    out = join([mixer.out_proj])
    parts = [mixer[name] for name in (names if in_a_row else ("in_proj_qkvz", "in_proj_ba"))]
    joined = out and project(parts)
    sizes = order(mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
    return RecurrentStep(layer, sizes, joined, out, stream) if joined and out else None


def _layout(attention: Any) -> heads.Layout | None:
    """None: its positions are not plain rotary ones."""
    rope = attention.rope
    if type(rope) is not nn.RoPE or rope.traditional or rope.scale != 1:
        return None
    if isinstance(attention, qwen3.Attention):
        D = attention.q_norm.weight.size
        return heads.Layout(attention.n_heads, attention.n_kv_heads, D, D, rope.dims, rope.base)
    Q, K, D = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    return heads.Layout(Q, K, D, 2 * D, rope.dims, rope.base)
