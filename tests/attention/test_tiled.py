"""Tiled attention is ordinary attention over packed and exact keys, whatever the tiles."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.sequences import causal, new_cache, random_tokens, reference, relative_error
from tqstack.attention import tiled


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles even for short caches."""
    monkeypatch.setattr(tiled, "KEY_TILE", 32)
    monkeypatch.setattr(tiled, "QUERY_TILE", 8)


def filled(rng, length, new, spec="tq4", exact_tokens=16, heads=2, dim=64):
    """A cache of `length` tokens, the last `new` of which came in one piece."""
    (cache,) = new_cache(spec, exact_tokens)
    keys, values = random_tokens(rng, length, heads=heads, dim=dim)
    for a, b in ((0, length - new), (length - new, length)):
        if b > a:
            cache.update_and_fetch(keys[:, :, a:b], values[:, :, a:b])
    return cache


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 150),
    new=st.integers(1, 60),
    dim=st.sampled_from([64, 128]),
    kind=st.sampled_from(["none", "causal", "bool", "additive"]),
    sink=st.booleans(),
    exact_tokens=st.sampled_from([0, 16, 32]),
)
def test_it_equals_attention_over_what_every_query_sees(
    seed, kv_heads, groups, length, new, dim, kind, sink, exact_tokens
):
    rng = np.random.default_rng(seed)
    new, heads = min(new, length), kv_heads * groups
    cache = filled(rng, length, new, exact_tokens=exact_tokens, heads=kv_heads, dim=dim)
    queries = mx.array(rng.normal(size=(1, heads, new, dim)).astype(np.float32))
    sinks = mx.array(rng.normal(size=heads).astype(np.float32)) if sink else None
    rows = np.ones((heads, new, length), bool)
    mask = None
    if kind == "causal":
        mask, rows = "causal", causal(heads, new, length)
    elif kind == "bool":
        rows = np.broadcast_to(rng.random((1, new, length)) < 0.7, (heads, new, length))
        mask = mx.array(rows[:1])
    elif kind == "additive":
        summand = rng.normal(size=(new, length)).astype(np.float32)
        mask, rows = mx.array(summand), np.broadcast_to(summand, (heads, new, length))
    expected = reference(queries[0], cache, 0.3, rows, sinks)
    out = cache.attend(queries, 0.3, mask, sinks)
    assert relative_error(out[0], expected) < 1e-5


def test_a_query_that_sees_nothing_gets_zero_and_not_nan():
    cache = filled(np.random.default_rng(0), 50, 2)
    out = cache.attend(mx.ones((1, 2, 2, 64)), 1.0, mx.zeros((2, 50), mx.bool_))
    assert mx.array_equal(out, mx.zeros_like(out))


def test_half_precision_queries_come_back_in_their_own_type():
    cache = filled(np.random.default_rng(0), 50, 1)
    queries = mx.random.normal((1, 4, 1, 64)).astype(mx.bfloat16)
    out = cache.attend(queries, 0.125, None)
    assert out.dtype == mx.bfloat16
    want = reference(queries[0].astype(mx.float32), cache, 0.125, np.ones((4, 1, 50), bool))
    assert relative_error(out[0], want) < 4e-3


def test_an_unknown_mask_name_is_an_error():
    cache = filled(np.random.default_rng(0), 4, 1)
    with pytest.raises(ValueError, match="'sliding' is not known"):
        cache.attend(mx.ones((1, 2, 1, 64)), 1.0, "sliding")


@pytest.mark.parametrize("device", [None, "cuda"])  # where MLX queues deeply, it has to wait
def test_peak_memory_of_a_prefill_step_does_not_grow_with_the_context(monkeypatch, device):
    monkeypatch.setattr(tiled, "gpu_dialect", lambda: device)
    monkeypatch.setattr(tiled, "KEY_TILE", 256)
    monkeypatch.setattr(tiled, "QUERY_TILE", 128)
    monkeypatch.setattr(tiled, "IN_FLIGHT", 1 << 20)
    rng = np.random.default_rng(0)

    def workspace(length):
        cache = filled(rng, length, 128, heads=1)
        queries = mx.array(rng.normal(size=(1, 8, 128, 64)).astype(np.float32))
        mx.eval(queries, cache._reading.tail_keys, cache._reading.tail_values, cache._reading.slabs)
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
    cache = filled(np.random.default_rng(0), 200, 30)
    queries = mx.random.normal((1, 4, 30, 64))
    want = cache.attend(queries, 0.125, "causal")
    monkeypatch.setattr(tiled, "gpu_dialect", lambda: "cuda")
    monkeypatch.setattr(tiled, "IN_FLIGHT", 0)
    assert mx.array_equal(cache.attend(queries, 0.125, "causal"), want)
