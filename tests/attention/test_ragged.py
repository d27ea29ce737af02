"""Sequences of many lengths decode at once as each by itself."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.sequences import causal, new_cache, random_tokens, reference, relative_error
from tqstack.attention import tiled
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.pool import Pool


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "KEY_TILE", 64)


def batch(rng, lengths, new, exact_tokens=16):
    """A batch whose sequences have these lengths, the last `new` of which came together."""
    pool, caches = Pool(1, block_tokens=16), []
    for length in lengths:
        (cache,) = new_cache(exact_tokens=exact_tokens, pool=pool)
        if length > new:
            cache.update_and_fetch(*random_tokens(rng, length - new))
        caches.append(cache)
    merged = TurboQuantKVCache.merge(caches)
    merged.update_and_fetch(*random_tokens(rng, new, batch=len(lengths)))
    return merged


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(3, 300), min_size=2, max_size=5),
    new=st.integers(1, 3),
    sink=st.booleans(),
    exact_tokens=st.sampled_from([0, 16, 32]),
)
def test_every_sequence_gets_attention_over_what_it_sees(seed, lengths, new, sink, exact_tokens):
    rng = np.random.default_rng(seed)
    cache = batch(rng, lengths, new, exact_tokens)
    queries = mx.array(rng.normal(size=(len(lengths), 4, new, 64)).astype(np.float32))
    sinks = mx.array(rng.normal(size=4).astype(np.float32)) if sink else None
    out = cache.attend(queries, 0.3, "causal" if new > 1 else None, sinks)
    for i, length in enumerate(lengths):
        rows = causal(4, new, length)
        expected = reference(queries[i], cache, 0.3, rows, sinks, i)
        assert relative_error(out[i], expected) < 1e-5


def test_padding_gets_zero():
    cache = batch(np.random.default_rng(0), [40, 90], 1)
    cache.prepare(lengths=[3, 1], right_padding=[0, 2])
    cache.update_and_fetch(*random_tokens(np.random.default_rng(1), 3, batch=2))
    out = cache.attend(mx.ones((2, 4, 3, 64)), 0.3, "causal")
    assert not mx.any(out[1, :, 1:]) and mx.all(mx.any(out[0] != 0, axis=-1))
    assert mx.all(mx.any(out[1, :, :1] != 0, axis=-1))


def test_memory_does_not_grow_with_the_longest_sequence():
    def workspace(length):
        cache = batch(np.random.default_rng(0), [length, 40, 40, 40], 1)
        queries = mx.ones((4, 4, 1, 64))
        mx.eval(queries, cache._reading.tail_keys, cache._reading.tail_values, cache._reading.slabs)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(cache.attend(queries, 0.3))
        return mx.get_peak_memory() - held

    assert workspace(32_000) < 1.5 * workspace(8_000)  # several tiles are on their way at once
