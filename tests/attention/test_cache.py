"""The compressed cache keeps mlx-lm's contract, and holds what it says it holds."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as mlx_cache

from tqstack.attention.cache import TurboQuantKVCache

SPECS = ["tq4", "tq3", "none"]


def tokens(rng, n, batch=1, heads=2, dim=64):
    return [mx.array(rng.normal(size=(batch, heads, n, dim)).astype(np.float32)) for _ in "kv"]


def single(rng, n, spec="tq4"):
    cache = TurboQuantKVCache(spec)
    if n:
        cache.update_and_fetch(*tokens(rng, n))
    return cache


def content(cache):
    """Used part of every plane."""
    planes = (*(cache.keys or ()), *(cache.values or ()))
    return [np.array(plane[:, :, : cache.length]) for plane in planes]


def same(a, b):
    return a.length == b.length and all(
        np.array_equal(x, y) for x, y in zip(content(a), content(b), strict=True)
    )


@pytest.mark.parametrize("spec, ratio", [("tq4", 0.27), ("tq3", 0.21), ("tq2", 0.14)])
def test_bytes_held_at_4000_tokens_are_a_small_part_of_16_bits(spec, ratio):
    cache = TurboQuantKVCache(spec)
    rng = np.random.default_rng(0)
    for n in (2048, 1952, 1, 1):
        cache.update_and_fetch(*tokens(rng, n, dim=256))
    mx.eval(cache.state)
    assert cache.nbytes_fp16 == 2 * 2 * 4002 * 512
    assert cache.nbytes <= ratio * cache.nbytes_fp16


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_tokens_that_come_in_pieces_are_stored_as_if_they_came_at_once(seed, pieces):
    rng = np.random.default_rng(seed)
    keys, values = tokens(rng, sum(pieces))
    whole, parts, at = TurboQuantKVCache(), TurboQuantKVCache(), 0
    whole.update_and_fetch(keys, values)
    for n in pieces:
        parts.update_and_fetch(keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
    assert same(whole, parts)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
    st.sampled_from(SPECS),
)
def test_merge_then_extract_gives_back_every_sequence(seed, lengths, spec):
    rng = np.random.default_rng(seed)
    caches = [single(rng, n, spec) for n in lengths]
    batch = TurboQuantKVCache.merge(caches)
    assert batch.offset.tolist() == lengths
    if max(lengths):
        for i, cache in enumerate(caches):
            if not cache.empty():
                assert same(batch.extract(i), cache)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.data())
def test_extend_and_filter_keep_the_other_sequences_as_they_were(seed, data):
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=2, max_size=5))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    caches = [single(rng, n) for n in lengths]
    batch = TurboQuantKVCache.merge(caches[:cut])
    batch.extend(TurboQuantKVCache.merge(caches[cut:]))
    keep = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    batch.filter(keep)
    assert batch.offset.tolist() == [lengths[i] for i in keep]
    assert min(batch.padding) == 0
    for row, i in enumerate(keep):
        assert same(batch.extract(row), caches[i])


def test_right_padded_prompts_end_up_like_single_ones():
    rng = np.random.default_rng(0)
    keys, values = tokens(rng, 40, batch=3)
    lengths = [40, 7, 23]
    batch = TurboQuantKVCache.merge([TurboQuantKVCache() for _ in lengths])
    batch.prepare(lengths=lengths, right_padding=[40 - n for n in lengths])
    batch.update_and_fetch(keys, values)
    batch.finalize()
    assert batch.offset.tolist() == lengths
    for i, n in enumerate(lengths):
        alone = TurboQuantKVCache()
        alone.update_and_fetch(keys[i : i + 1, :, :n], values[i : i + 1, :, :n])
        assert same(batch.extract(i), alone)


def test_trim_takes_the_last_tokens_away():
    rng = np.random.default_rng(0)
    cache = single(rng, 50)
    before = content(cache)
    assert (cache.trim(20), cache.offset, cache.trim(99), cache.offset) == (20, 30, 30, 0)
    cache = single(np.random.default_rng(0), 50)
    cache.trim(20)
    assert all(np.array_equal(x, y[:, :, :30]) for x, y in zip(content(cache), before, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_save_and_load_are_exact(tmp_path, spec):
    rng = np.random.default_rng(0)
    caches = [single(rng, 30, spec), TurboQuantKVCache.merge([single(rng, 5), single(rng, 9)])]
    caches.append(TurboQuantKVCache("tq3/tq4"))
    path = str(tmp_path / "cache.safetensors")
    mlx_cache.save_prompt_cache(path, caches)
    loaded = mlx_cache.load_prompt_cache(path)
    for before, after in zip(caches, loaded, strict=True):
        assert isinstance(after, TurboQuantKVCache)
        assert (after.key_spec, after.value_spec) == (before.key_spec, before.value_spec)
        assert (after.padding, after.head_dims) == (before.padding, before.head_dims)
        assert same(before, after)
    more = tokens(rng, 3)
    for cache in (caches[0], loaded[0]):
        cache.update_and_fetch(*more)
    assert same(caches[0], loaded[0])


def test_a_deep_copy_is_independent():
    rng = np.random.default_rng(0)
    cache = single(rng, 10)
    twin, before = copy.deepcopy(cache), content(cache)
    twin.update_and_fetch(*tokens(rng, 5))
    twin.trim(12)
    twin.update_and_fetch(*tokens(rng, 12))
    mx.eval(twin.state)
    assert cache.length == 10
    assert all(np.array_equal(x, y) for x, y in zip(content(cache), before, strict=True))


def test_mlx_lm_cannot_take_it_for_its_own_quantized_cache():
    cache = TurboQuantKVCache()
    assert not hasattr(cache, "bits")
    assert not hasattr(cache, "to_quantized")
    assert not isinstance(cache, mlx_cache.KVCache)


@pytest.mark.parametrize("bits, ratio", [(4, 3.94), (3, 5.22), (2, 7.76), ("tcq3-l8", 5.22)])
def test_a_live_cache_stores_exactly_the_codes_and_a_norm_per_vector(bits, ratio):
    cache, rng = TurboQuantKVCache(bits), np.random.default_rng(0)
    cache.update_and_fetch(*tokens(rng, 300, dim=256))
    mx.eval(cache.state)
    vectors, width = 2 * 2 * 300, int(str(bits).removeprefix("tcq")[0])
    assert cache.nbytes_used == vectors * (256 * width // 8 + 2)
    assert round(cache.nbytes_fp16 / cache.nbytes_used, 2) == ratio
    # Blocks of 256 tokens, and nothing else.
    assert cache.nbytes == cache.nbytes_used * 512 // 300


@pytest.mark.parametrize("bits", [4, 3.5, "tcq2-l8", "prod3", "affine4-g64", "none"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e38, 1e-45, 0.0])
def test_bad_values_never_poison_the_cache(bits, poison):
    rng = np.random.default_rng(0)
    keys, values = (np.array(x) for x in tokens(rng, 20))
    keys[0, 0, 3], values[0, 1, 5, 7] = poison, poison
    cache = TurboQuantKVCache(bits)
    cache.update_and_fetch(mx.array(keys), mx.array(values))
    out = np.array(cache.attend(mx.array(rng.normal(size=(1, 4, 2, 64))), 0.125, "causal"))
    assert np.isfinite(out).all()


def test_a_head_size_that_no_codec_takes_is_an_error_that_tells_it():
    with pytest.raises(ValueError, match="100"):
        TurboQuantKVCache().update_and_fetch(mx.zeros((1, 1, 4, 100)), mx.zeros((1, 1, 4, 100)))
