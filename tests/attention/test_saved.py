"""Caches that were saved hold the same bits when they are loaded again."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as mlx_cache

from attention.sequences import CODECS, new_cache, random_tokens, same
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.pool import Pool


@pytest.mark.parametrize("codecs", CODECS)
def test_save_and_load_are_exact(tmp_path, codecs):
    rng = np.random.default_rng(0)
    pool = Pool(1)
    caches = [
        TurboQuantKVCache(codecs),
        TurboQuantKVCache.merge([single_of(rng, n, pool) for n in (5, 300, 9)]),
        TurboQuantKVCache("tq3/tq4"),
    ]
    caches[0].update_and_fetch(*random_tokens(rng, 400))
    path = str(tmp_path / "cache.safetensors")
    mlx_cache.save_prompt_cache(path, caches)
    loaded = mlx_cache.load_prompt_cache(path)
    for before, after in zip(caches, loaded, strict=True):
        assert isinstance(after, TurboQuantKVCache)
        assert (after.codecs, after.is_batch) == (before.codecs, before.is_batch)
        assert after.lengths == before.lengths and after.nbytes <= before.nbytes
        if not before.empty():
            assert all(same(before, after, i, i) for i in range(len(before.lengths)))
    more, queries = random_tokens(rng, 3), mx.array(rng.normal(size=(1, 4, 3, 64)))
    outputs = []
    for cache in (caches[0], loaded[0]):
        cache.update_and_fetch(*more)
        outputs.append(np.array(cache.attend(queries, 0.125, "causal")))
    assert same(caches[0], loaded[0])
    assert np.array_equal(*outputs)


def single_of(rng, n, pool):
    (cache,) = new_cache(exact_tokens=128, pool=pool)
    cache.update_and_fetch(*random_tokens(rng, n))
    return cache


def test_layers_that_were_saved_together_share_their_blocks_again(tmp_path):
    rng = np.random.default_rng(0)
    layers = new_cache(layers=3, exact_tokens=128, block_tokens=128)
    for cache in layers:
        cache.update_and_fetch(*random_tokens(rng, 700))
    path = str(tmp_path / "cache.safetensors")
    mlx_cache.save_prompt_cache(path, layers)
    loaded = mlx_cache.load_prompt_cache(path)
    assert len({id(cache.tables[0]) for cache in loaded}) == 1
    assert loaded[0].pool.blocks_used == layers[0].pool.blocks_used
    batch = [
        TurboQuantKVCache.merge([own, other]) for own, other in zip(layers, loaded, strict=True)
    ]
    assert all(same(cache, batch[i], 0, 1) for i, cache in enumerate(loaded))
    assert batch[0].pool.blocks_used == 2 * loaded[0].pool.blocks_used
    again = mlx_cache.load_prompt_cache(path)
    assert again[0].tables[0] is not loaded[0].tables[0]


def test_what_another_version_saved_is_refused_with_what_to_do(tmp_path):
    cache = TurboQuantKVCache()
    cache.update_and_fetch(*random_tokens(np.random.default_rng(0), 300))
    text, *arrays = cache.state
    for old, new in (('"format": 2', '"format": 1'), ('"block_tokens": 128', '"block_tokens": 64')):
        with pytest.raises(ValueError, match="read the prompt again"):
            TurboQuantKVCache.from_state((text.replace(old, new), *arrays))
    with pytest.raises(ValueError, match="read the prompt again"):
        TurboQuantKVCache.from_state(([], [], 5, None))
    with pytest.raises(ValueError, match="damaged"):
        TurboQuantKVCache.from_state((text.replace("tq4", "tq3"), *arrays))
