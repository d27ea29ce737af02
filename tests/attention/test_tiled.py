"""Tiled attention is ordinary attention over the decompressed cache, whatever the tiles."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqstack.attention import tiled
from tqstack.attention.cache import TurboQuantKVCache


def reference(queries, cache, scale, mask, sinks=None):
    """Float64 attention over the decompressed, unrotated cache."""
    k = cache.key_codec.unrotate(cache.key_codec.decode(cache.keys))[:, :, : cache.length]
    v = cache.value_codec.unrotate(cache.value_codec.decode(cache.values))[:, :, : cache.length]
    q, k, v = (np.array(x.astype(mx.float32), np.float64) for x in (queries, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = q @ np.repeat(k, groups, 1).swapaxes(-1, -2) * scale
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(-1, keepdims=True, initial=-1e30)
    if sinks is not None:
        sinks = np.array(sinks, np.float64)[None, :, None, None]
        top = np.maximum(top, sinks)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    return p @ np.repeat(v, groups, 1) / np.maximum(total, 1e-300)


def filled(rng, batch, kv_heads, length, dim, spec="tq4"):
    cache = TurboQuantKVCache(spec)
    shape = (batch, kv_heads, length, dim)
    cache.update_and_fetch(mx.array(rng.normal(size=shape)), mx.array(rng.normal(size=shape)))
    return cache


def relative_error(out, expected):
    out = np.array(out.astype(mx.float32), np.float64)
    return np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles even for short caches."""
    monkeypatch.setattr(tiled, "KEY_TILE", 16)
    monkeypatch.setattr(tiled, "QUERY_TILE", 8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 60),
    new=st.integers(1, 60),
    dim=st.sampled_from([64, 128]),
    kind=st.sampled_from(["none", "causal", "bool", "additive"]),
    sink=st.booleans(),
    padded=st.booleans(),
)
def test_it_equals_attention_over_the_decompressed_cache(
    seed, batch, kv_heads, groups, length, new, dim, kind, sink, padded
):
    rng = np.random.default_rng(seed)
    new, heads = min(new, length), kv_heads * groups
    cache = filled(rng, batch, kv_heads, length, dim)
    queries = mx.array(rng.normal(size=(batch, heads, new, dim)).astype(np.float32))
    sinks = mx.array(rng.normal(size=heads).astype(np.float32)) if sink else None
    allowed = np.ones((batch, heads, new, length), bool)
    if padded:
        cache.padding = [int(p) for p in rng.integers(0, length, batch)]
        for i, pad in enumerate(cache.padding):
            allowed[i, :, :, :pad] = False
    bias = np.zeros_like(allowed, np.float64)
    mask = None
    if kind == "causal":
        mask = "causal"
        allowed &= np.arange(length) <= np.arange(length - new, length)[:, None]
    elif kind == "bool":
        given_mask = rng.random((batch, 1, new, length)) < 0.7
        mask, allowed = mx.array(given_mask), allowed & given_mask
    elif kind == "additive":
        bias = bias + rng.normal(size=(new, length)).astype(np.float32)
        mask = mx.array(bias[0, 0].astype(np.float32))
    expected = reference(queries, cache, 0.3, np.where(allowed, bias, -np.inf), sinks)
    out = cache.attend(queries, 0.3, mask, sinks)
    assert relative_error(out, expected) < 1e-5


def test_a_query_that_sees_nothing_gets_zero_and_not_nan():
    cache = filled(np.random.default_rng(0), 1, 1, 20, 64)
    out = cache.attend(mx.ones((1, 1, 2, 64)), 1.0, mx.zeros((2, 20), mx.bool_))
    assert mx.array_equal(out, mx.zeros_like(out))


def test_half_precision_queries_come_back_in_their_own_type():
    cache = filled(np.random.default_rng(0), 1, 2, 20, 64)
    queries = mx.random.normal((1, 4, 1, 64)).astype(mx.bfloat16)
    out = cache.attend(queries, 0.125, None)
    assert out.dtype == mx.bfloat16
    exact = reference(queries, cache, 0.125, np.ones((1, 4, 1, 20), bool))
    assert relative_error(out, exact) < 4e-3


def test_an_unknown_mask_name_is_an_error():
    cache = filled(np.random.default_rng(0), 1, 1, 4, 64)
    with pytest.raises(ValueError, match="'sliding' is not known"):
        cache.attend(mx.ones((1, 1, 1, 64)), 1.0, "sliding")


@pytest.mark.parametrize("device", [None, "cuda"])  # where MLX queues deeply, it has to wait
def test_peak_memory_of_a_prefill_step_does_not_grow_with_the_context(monkeypatch, device):
    monkeypatch.setattr(tiled, "backend", lambda: device)
    monkeypatch.setattr(tiled, "KEY_TILE", 256)
    monkeypatch.setattr(tiled, "QUERY_TILE", 128)
    monkeypatch.setattr(tiled, "IN_FLIGHT", 1 << 20)
    rng = np.random.default_rng(0)

    def workspace(length):
        cache = filled(rng, 1, 1, length, 64)
        queries = mx.array(rng.normal(size=(1, 8, 128, 64)).astype(np.float32))
        mx.eval(queries, cache.state)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(cache.attend(queries, 0.125, "causal"))
        return mx.get_peak_memory() - held

    short, long = workspace(2_000), workspace(16_000)
    assert long < 1.5 * short
    assert long < 8 * 128 * 16_000 * 4 / 2  # half of one float32 score matrix


def test_the_query_tile_follows_the_size_of_the_chip():
    m4, m4_max, m2_ultra = "applegpu_g16g", "applegpu_g16s", "applegpu_g14d"
    assert tiled.query_tile(m4) < tiled.query_tile(m4_max) < tiled.query_tile(m2_ultra)
    assert tiled.query_tile("x86_64") == tiled.query_tile("sm_90") == tiled.query_tile("") == 512


def test_waiting_for_tiles_changes_nothing(monkeypatch):
    monkeypatch.setattr(tiled, "KEY_TILE", 16)
    monkeypatch.setattr(tiled, "QUERY_TILE", 8)
    cache = filled(np.random.default_rng(0), 2, 2, 100, 64)
    queries = mx.random.normal((2, 4, 30, 64))
    want = cache.attend(queries, 0.125, "causal")
    monkeypatch.setattr(tiled, "backend", lambda: "cuda")
    monkeypatch.setattr(tiled, "IN_FLIGHT", 0)
    assert mx.array_equal(cache.attend(queries, 0.125, "causal"), want)
