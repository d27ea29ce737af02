"""The compressed cache keeps mlx-lm's contract, and holds what it says it holds."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import cache as mlx_cache

from attention.sequences import (
    CODECS,
    causal,
    new_cache,
    random_tokens,
    reference,
    relative_error,
    same,
    visible,
    words,
)
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.pool import Pool, PoolFullError


def single(rng, n, codecs="tq4", exact_tokens=16, pool=None):
    (cache,) = new_cache(codecs, exact_tokens, pool=pool)
    if n:
        cache.update_and_fetch(*random_tokens(rng, n))
    return cache


def read(cache, rng, L=1, heads=4):
    """Attention of random queries after L more tokens."""
    keys, values = random_tokens(rng, L, batch=len(cache.lengths))
    cache.update_and_fetch(keys, values)
    queries = mx.array(rng.normal(size=(len(cache.lengths), heads, L, 64)).astype(np.float32))
    return np.array(cache.attend(queries, 0.125, "causal" if L > 1 else None)), queries


@pytest.mark.parametrize("codecs, ratio", [("tq4", 0.27), ("tq3", 0.21), ("tq2", 0.15)])
def test_bytes_held_at_32000_tokens_are_a_small_part_of_16_bits(codecs, ratio):
    cache, rng = TurboQuantKVCache(codecs), np.random.default_rng(0)
    pieces = [random_tokens(rng, n, dim=256) for n in (2048, 1)]
    for _ in range(16):
        cache.update_and_fetch(*(x.astype(mx.float16) for x in pieces[0]))
        mx.eval(cache.state)
    cache.update_and_fetch(*(x.astype(mx.float16) for x in pieces[1]))
    mx.eval(cache.state)
    assert cache.nbytes_fp16 == 2 * 2 * 32_769 * 512
    assert cache.nbytes <= ratio * cache.nbytes_fp16


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.sampled_from([0, 16, 32]),
)
def test_tokens_that_come_in_pieces_are_stored_as_if_they_came_at_once(seed, pieces, exact):
    rng = np.random.default_rng(seed)
    keys, values = random_tokens(rng, sum(pieces))
    (whole,), (parts,), at = new_cache(exact_tokens=exact), new_cache(exact_tokens=exact), 0
    whole.update_and_fetch(keys, values)
    for n in pieces:
        parts.update_and_fetch(keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
    assert same(whole, parts)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 90),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([0, 16, 32]),
)
def test_every_query_sees_by_its_position_however_it_came(seed, first, pieces, exact):
    """A chunk's queries, single tokens' and drafts' all give what one chunk gives."""
    rng = np.random.default_rng(seed)
    pieces = [first, *pieces]
    keys, values = random_tokens(rng, sum(pieces))
    queries = mx.array(rng.normal(size=(1, 4, sum(pieces), 64)).astype(np.float32))
    (whole,), (parts,) = new_cache(exact_tokens=exact), new_cache(exact_tokens=exact)
    whole.update_and_fetch(keys, values)
    want, at, got = whole.attend(queries, 0.125, "causal"), 0, []
    for n in pieces:
        piece = slice(at, at + n)
        parts.update_and_fetch(keys[:, :, piece], values[:, :, piece])
        got.append(parts.attend(queries[:, :, piece], 0.125, "causal"))
        at += n
    assert relative_error(mx.concatenate(got, axis=2), np.array(want)) < 1e-5


def test_a_rejected_draft_leaves_no_trace_even_across_the_edge_of_a_block():
    rng = np.random.default_rng(0)
    keys, values = random_tokens(rng, 80)
    for length in range(40, 52):
        (plain,), (drafted,) = new_cache(), new_cache()
        for cache in (plain, drafted):
            cache.update_and_fetch(keys[:, :, :length], values[:, :, :length])
        drafted.update_and_fetch(*random_tokens(rng, 8))
        drafted.attend(mx.zeros((1, 2, 8, 64)), 1.0, "causal")
        drafted.trim(8)
        queries = mx.array(rng.normal(size=(1, 4, 2, 64)).astype(np.float32))
        outputs = []
        for cache in (plain, drafted):
            cache.update_and_fetch(*(x[:, :, length : length + 2] for x in (keys, values)))
            outputs.append(cache.attend(queries, 0.125, "causal"))
        assert relative_error(outputs[1], np.array(outputs[0])) < 1e-6
        packed = plain.packed[0]  # the draft may have had one block more packed
        assert np.array_equal(words(plain), words(drafted)[:packed])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 90), min_size=1, max_size=4),
    st.sampled_from(CODECS),
)
def test_merge_then_extract_gives_back_every_sequence(seed, lengths, codecs):
    rng = np.random.default_rng(seed)
    pool = Pool(1, block_tokens=16)
    caches = [single(rng, n, codecs, pool=pool) for n in lengths]
    batch = TurboQuantKVCache.merge(caches)
    assert batch.offset.tolist() == lengths
    for i, cache in enumerate(caches):
        if not cache.empty():
            assert same(batch.extract(i), cache)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.data())
def test_a_batch_attends_as_each_sequence_does_by_itself(seed, data):
    rng = np.random.default_rng(seed)
    pool = Pool(1, block_tokens=16)
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=2, max_size=5))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    caches = [single(rng, n, pool=pool) for n in lengths]
    batch = TurboQuantKVCache.merge(caches[:cut])
    batch.extend(TurboQuantKVCache.merge(caches[cut:]))
    keep = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    batch.filter(keep)
    assert batch.offset.tolist() == [lengths[i] for i in keep]
    for L in data.draw(st.lists(st.sampled_from([1, 2, 3, 20]), min_size=1, max_size=4)):
        out, queries = read(batch, rng, L)
        for row, length in enumerate(batch.lengths):
            want = reference(queries[row], batch, 0.125, causal(4, L, length), i=row)
            assert relative_error(mx.array(out[row]), want) < 1e-5
    pool.check_integrity()


@pytest.mark.parametrize("chunks", [(40,), (10, 30), (5, 3, 32)])
def test_right_padded_prompts_end_up_like_single_ones(chunks):
    rng = np.random.default_rng(0)
    keys, values = random_tokens(rng, 40, batch=3)
    queries = mx.array(rng.normal(size=(3, 4, 40, 64)).astype(np.float32))
    lengths, at, outputs = [40, 7, 23], 0, []
    pool = Pool(1, block_tokens=16)
    batch = TurboQuantKVCache.merge([single(rng, 0, pool=pool) for _ in lengths])
    batch.prepare(lengths=lengths, right_padding=[40 - n for n in lengths])
    for n in chunks:
        piece = slice(at, at + n)
        batch.update_and_fetch(keys[:, :, piece], values[:, :, piece])
        outputs.append(batch.attend(queries[:, :, piece], 0.125, "causal"))
        at += n
    batch.finalize()
    out = mx.concatenate(outputs, axis=2)
    assert mx.isfinite(out).all()
    assert batch.offset.tolist() == lengths
    for i, n in enumerate(lengths):
        alone = single(rng, 0)
        alone.update_and_fetch(keys[i : i + 1, :, :n], values[i : i + 1, :, :n])
        assert same(batch.extract(i), alone)
        want = alone.attend(queries[i : i + 1, :, :n], 0.125, "causal")
        assert relative_error(out[i : i + 1, :, :n], np.array(want)) < 1e-5


def test_a_window_mask_of_a_batch_counts_each_sequences_own_positions():
    rng = np.random.default_rng(0)
    pool = Pool(1, block_tokens=16)
    batch = TurboQuantKVCache.merge([single(rng, n, pool=pool) for n in (50, 3)])
    mask = batch.make_mask(2, window_size=4)
    assert mask.shape == (2, 1, 2, 52)
    keys, values = random_tokens(rng, 2, batch=2)
    batch.update_and_fetch(keys, values)
    queries = mx.array(rng.normal(size=(2, 4, 2, 64)).astype(np.float32))
    out = batch.attend(queries, 0.125, mask)
    for row, length in enumerate((52, 5)):
        rows = causal(4, 2, length) & (
            np.arange(length) > np.arange(length - 2, length)[:, None] - 4
        )
        want = reference(queries[row], batch, 0.125, rows, i=row)
        assert relative_error(out[row], want) < 1e-5


def test_trim_takes_the_last_tokens_away():
    cache = single(np.random.default_rng(0), 50)
    assert (cache.trim(20), cache.offset, cache.trim(99), cache.offset) == (20, 30, 30, 0)
    assert cache.empty() and cache.pool.blocks_used == 0


@pytest.mark.parametrize("length", [0, 5, 16, 33, 40, 60, 63])
def test_after_a_trim_packed_values_stand_in_for_exact_ones(length):
    rng = np.random.default_rng(0)
    keys, values = random_tokens(rng, 120)
    (cache,) = new_cache()
    cache.update_and_fetch(keys[:, :, :100], values[:, :, :100])
    before = visible(cache)
    cache.trim(100 - length)
    assert cache.offset == length
    packed_k, _, exact_k, _ = visible(cache)
    now = np.where(np.isnan(exact_k), packed_k, exact_k)
    assert np.allclose(now, before[0][:, :length], atol=1e-5)
    cache.update_and_fetch(keys[:, :, 100:], values[:, :, 100:])
    queries = mx.array(rng.normal(size=(1, 4, 20, 64)).astype(np.float32))
    out = cache.attend(queries, 0.125, "causal")
    want = reference(queries[0], cache, 0.125, causal(4, 20, length + 20))
    assert relative_error(out[0], want) < 1e-5


def test_keys_of_another_head_dim_are_refused_and_nothing_is_lost():
    rng = np.random.default_rng(0)
    cache = single(rng, 40)
    with pytest.raises(ValueError, match=r"keys 64 tq4.*, not 2 heads, keys 128"):
        cache.update_and_fetch(*random_tokens(rng, 4, dim=128))
    assert cache.offset == 40
    assert np.isfinite(read(cache, rng)[0]).all()


def test_caches_of_other_codecs_cannot_join_a_batch():
    rng = np.random.default_rng(0)
    batch = TurboQuantKVCache.merge([single(rng, 40)])
    for other in (single(rng, 40, "tq3"), single(rng, 40, exact_tokens=32)):
        with pytest.raises(ValueError, match="cannot join"):
            batch.extend(other)
    assert batch.lengths == [40]


def test_a_full_pool_is_told_before_a_forward_pass_and_nothing_changes():
    rng = np.random.default_rng(0)
    pool = Pool(1, block_tokens=16)
    first = single(rng, 33, pool=pool)
    pool.limit = pool.nbytes  # the first slab, and no more
    free = pool.blocks_free
    first.reserve(16 * free)
    with pytest.raises(PoolFullError) as failure:
        first.reserve(16 * free + 200)
    assert failure.value.needed > failure.value.available
    with pytest.raises(PoolFullError):  # nobody reserved: the first layer refuses, and is as it was
        first.update_and_fetch(*random_tokens(rng, 16 * free + 200))
    assert first.lengths == [33] and np.isfinite(read(first, rng)[0]).all()
    other = single(rng, 30, pool=pool)
    with pytest.raises(PoolFullError):
        other.reserve(40)
    first.tables[0].free()
    other.reserve(40)
    pool.check_integrity()


def test_a_freed_sequence_cannot_be_read():
    cache = single(np.random.default_rng(0), 50)
    cache.tables[0].free()
    with pytest.raises(RuntimeError, match="was freed"):
        read(cache, np.random.default_rng(0))


def test_a_deep_copy_is_independent_and_shares_its_blocks():
    rng = np.random.default_rng(0)
    cache = single(rng, 100)
    used = cache.pool.blocks_used
    twin, before = copy.deepcopy(cache), copy.deepcopy(cache)
    assert cache.pool.blocks_used == used
    twin.update_and_fetch(*random_tokens(rng, 5))
    twin.trim(60)
    twin.update_and_fetch(*random_tokens(rng, 50))
    mx.eval(twin.state)
    assert cache.lengths == [100] and same(cache, before)
    cache.pool.check_integrity()


def test_mlx_lm_cannot_take_it_for_its_own_quantized_cache():
    cache = TurboQuantKVCache()
    assert not hasattr(cache, "bits")
    assert not hasattr(cache, "to_quantized")
    assert not isinstance(cache, mlx_cache.KVCache)


@pytest.mark.parametrize("bits, per_vector", [(4, 130), (3, 98), (2, 66), ("tcq3-l8", 98)])
def test_blocks_hold_exactly_the_codes_and_a_norm_per_vector(bits, per_vector):
    cache, rng = TurboQuantKVCache(bits), np.random.default_rng(0)
    cache.update_and_fetch(*random_tokens(rng, 300, dim=256))
    mx.eval(cache.state)
    tail = 300 - 128  # tokens
    assert cache.packed == [1]
    assert cache.nbytes == 2 * 2 * (128 * per_vector + tail * 256 * 4)


def test_a_tail_that_is_also_being_read_counts_once():
    cache = TurboQuantKVCache()
    cache.update_and_fetch(*random_tokens(np.random.default_rng(0), 100))
    assert cache.nbytes == 2 * 2 * 100 * 64 * 4


@pytest.mark.parametrize("bits", [4, 3.5, "tcq2-l8", "prod3", "affine4-g64", "none"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e38, 1e-45, 0.0])
def test_bad_values_never_poison_the_cache(bits, poison):
    rng = np.random.default_rng(0)
    keys, values = (np.array(x) for x in random_tokens(rng, 60))
    for at in (3, 55):  # packed, and exact
        keys[0, 0, at], values[0, 1, at, 7] = poison, poison
    (cache,) = new_cache(bits)
    cache.update_and_fetch(mx.array(keys), mx.array(values))
    out = np.array(cache.attend(mx.array(rng.normal(size=(1, 4, 2, 64))), 0.125, "causal"))
    assert np.isfinite(out).all()


def test_a_head_size_that_no_codec_takes_is_an_error_that_tells_it():
    with pytest.raises(ValueError, match="100"):
        TurboQuantKVCache().update_and_fetch(mx.zeros((1, 1, 4, 100)), mx.zeros((1, 1, 4, 100)))


@pytest.mark.parametrize("tokens", [-128, 64, 100])
def test_exact_tokens_are_whole_blocks(tokens):
    with pytest.raises(ValueError, match="whole blocks of 128"):
        TurboQuantKVCache(exact_tokens=tokens)
