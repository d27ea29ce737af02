"""The pool's books are right after all that can be done to sequences, and nothing is copied."""

from __future__ import annotations

import copy
import gc
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.sequences import HEADS, new_cache, random_tokens, relative_error
from tqstack.attention.blocks import runs
from tqstack.attention.cache import TurboQuantKVCache
from tqstack.attention.pool import MAX_SLABS, Pool, PoolError, PoolFullError, UnknownBlockError
from tqstack.attention.table import Table
from tqstack.bench.speed import fill

BLOCK, LAYERS = 16, 2


class Sequences:
    """Live sequences in one pool, alone or in a batch, each beside the tokens that it holds."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.pool = Pool(LAYERS, block_tokens=BLOCK)
        self.alone: list[list[TurboQuantKVCache]] = []
        self.batch: list[TurboQuantKVCache] | None = None
        self.tokens: dict[int, list] = {}  # id of a list -> per layer (keys, values)
        self.histories: list[list] = []  # of `alone`
        self.batched: list[list] = []  # of the batch's rows

    def start(self) -> None:
        self.alone.append(new_cache("tq3", BLOCK, pool=self.pool))
        self.histories.append([[x[:, :, :0] for x in random_tokens(self.rng, 1)] for _ in "ab"])

    def append(self, which: int, count: int) -> None:
        which %= len(self.alone)
        self._append(self.alone[which], [self.histories[which]], count)

    def step(self, count: int) -> None:
        if self.batch:
            self._append(self.batch, self.batched, count)

    def _append(self, caches, histories, count) -> None:
        for layer, cache in enumerate(caches):
            keys, values = random_tokens(self.rng, count, batch=len(histories))
            cache.update_and_fetch(keys, values)
            cache.attend(mx.zeros((len(histories), HEADS, count, 64)), 1.0, "causal")
            for i, history in enumerate(histories):
                own = (keys[i : i + 1], values[i : i + 1])
                history[layer] = [
                    mx.concatenate(pair, axis=2) for pair in zip(history[layer], own, strict=True)
                ]

    def trim(self, which: int, count: int) -> None:
        """As far as nothing exact is lost."""
        which %= len(self.alone)
        caches = self.alone[which]
        length, start = caches[0].lengths[0], caches[0].tails.starts[0]
        least = start + BLOCK if start else 0
        count = min(count, length - least)
        if count > 0:
            for layer, cache in enumerate(caches):
                cache.trim(count)
                self.histories[which][layer] = [
                    x[:, :, : length - count] for x in self.histories[which][layer]
                ]

    def fork(self, which: int) -> None:
        which %= len(self.alone)
        self.alone.append(copy.deepcopy(self.alone[which]))
        self.histories.append([list(pair) for pair in self.histories[which]])

    def join(self, which: int) -> None:
        which %= len(self.alone)
        caches, history = self.alone[which], self.histories[which]
        merged = [type(cache).merge([cache]) for cache in caches]
        if self.batch is None:
            self.batch, self.batched = merged, []
        else:
            for own, other in zip(self.batch, merged, strict=True):
                own.extend(other)
        self.batched.append([list(pair) for pair in history])

    def leave(self, which: int) -> None:
        if self.batch:
            which %= len(self.batched)
            self.alone.append([cache.extract(which) for cache in self.batch])
            self.histories.append([list(pair) for pair in self.batched[which]])
            keep = [i for i in range(len(self.batched)) if i != which]
            for cache in self.batch:
                cache.filter(keep)
            self.batched = [self.batched[i] for i in keep]
            if not keep:
                self.batch = None

    def free(self, which: int) -> None:
        which %= len(self.alone)
        del self.alone[which], self.histories[which]

    def check(self) -> None:
        self.pool.check_integrity()
        tables = {id(c.tables[i]): c.tables[i] for c, i, _ in self.rows()}
        counted = Counter(block for table in tables.values() for block in table.ids)
        assert counted == {block: self.pool.holders(block) for block in counted}
        assert len(counted) == self.pool.blocks_used  # none is lost
        for cache, i, _ in self.rows():
            assert cache.packed[i] <= len(cache.tables[i].ids)

    def rows(self):
        """(cache, row, its tokens) of every layer of every sequence."""
        for caches, histories in (
            *zip(self.alone, [[h] for h in self.histories], strict=True),
            *([(self.batch, self.batched)] if self.batch else []),
        ):
            for layer, cache in enumerate(caches):
                for i, history in enumerate(histories):
                    yield cache, i, history[layer]

    def check_attention(self) -> None:
        """Every sequence attends as a fresh cache of its tokens does, with the same codes."""
        for cache, i, (keys, values) in self.rows():
            (fresh,) = new_cache("tq3", BLOCK, block_tokens=BLOCK)
            own = copy.deepcopy(cache)
            own.filter([i])
            if keys.shape[2]:
                fresh.update_and_fetch(keys, values)
                ids = fresh.tables[0].ids[: fresh.packed[0]]
                got = own.tables[0].ids[: fresh.packed[0]]
                if ids:
                    want = np.array(fresh.pool.read(0, ids))
                    assert np.array_equal(np.array(self.pool.read(own.layer, got)), want)
            more = random_tokens(self.rng, 2)
            queries = mx.array(self.rng.normal(size=(1, HEADS, 2, 64)).astype(np.float32))
            outputs = []
            for one in (own, fresh):
                one.update_and_fetch(*more)
                outputs.append(one.attend(queries, 0.125, "causal"))
            assert relative_error(outputs[0], np.array(outputs[1])) < 1e-5


actions = st.one_of(
    st.tuples(st.just("start")),
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(1, 60)),
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(1, 3)),
    st.tuples(st.just("step"), st.integers(1, 40)),
    st.tuples(st.just("trim"), st.integers(0, 9), st.integers(1, 40)),
    st.tuples(st.just("fork"), st.integers(0, 9)),
    st.tuples(st.just("join"), st.integers(0, 9)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("free"), st.integers(0, 9)),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(actions, min_size=3, max_size=20))
def test_no_block_is_lost_or_freed_twice_and_sequences_keep_tokens(seed, script):
    sequences = Sequences(seed)
    for name, *arguments in script:
        if not sequences.alone:
            sequences.start()
        getattr(sequences, name)(*arguments)
        sequences.check()
    sequences.check_attention()
    pool, held = sequences.pool, sequences.pool.nbytes
    del sequences
    gc.collect()
    assert pool.blocks_used == 0 and pool.nbytes == held
    pool.check_integrity()


def test_layers_share_a_block_of_the_same_tokens_also_after_forks():
    rng = np.random.default_rng(0)
    layers = new_cache(layers=3, exact_tokens=BLOCK, block_tokens=BLOCK)
    for cache in layers:
        cache.update_and_fetch(*random_tokens(rng, 100))
    used = layers[0].pool.blocks_used
    forks = [cache.extract(0) for cache in layers]  # as mlx-lm does, layer by layer
    again = [copy.deepcopy(cache) for cache in layers]
    for caches in (forks, again):
        for cache in caches:
            cache.update_and_fetch(*random_tokens(rng, 50))
    assert layers[0].pool.blocks_used == used + 2 * (layers[0]._full_blocks(150) - used)


def test_a_block_that_is_not_there_is_an_error_and_nothing_is_disturbed():
    pool = Pool(1, block_tokens=BLOCK)
    (cache,) = new_cache(pool=pool)
    cache.update_and_fetch(*random_tokens(np.random.default_rng(0), 100))
    held = cache.tables[0].ids[0]
    for wrong in (99, -1, 1 << 30):
        for action in (pool.retain, pool.release, lambda ids: pool.read(0, ids)):
            with pytest.raises(UnknownBlockError, match="not in use"):
                action([wrong])
        with pytest.raises(UnknownBlockError):
            pool.retain([held, wrong])
    assert pool.holders(held) == 1
    pool.check_integrity()


def test_blocks_are_bounded_by_the_limit_whatever_is_asked():
    pool = Pool(1, block_tokens=BLOCK)
    (cache,) = new_cache(pool=pool)
    cache.update_and_fetch(*random_tokens(np.random.default_rng(0), 40))
    pool.limit = 100 * pool.block_bytes
    taken = pool.allocate(60)
    assert pool.nbytes <= pool.limit
    with pytest.raises(PoolFullError, match="limit is"):
        pool.allocate(100)
    more = pool.allocate(100 - len(taken) - pool.blocks_used + len(taken))
    assert pool.nbytes == pool.limit and pool.blocks_free == 0
    pool.release([*taken, *more])
    pool.check_integrity()


def test_growing_takes_few_slabs():
    pool = Pool(1, block_tokens=BLOCK)
    (cache,) = new_cache(pool=pool)
    cache.update_and_fetch(*random_tokens(np.random.default_rng(0), 40, heads=1))
    for _ in range(1200):
        pool.allocate(10)
    assert len(pool.slabs(0)) < MAX_SLABS


def test_a_layer_cannot_store_two_kinds_of_blocks():
    rng, pool = np.random.default_rng(0), Pool(1, block_tokens=BLOCK)
    first, second = (TurboQuantKVCache(c, BLOCK, Table(pool)) for c in ("tq4", "tq3"))
    first.update_and_fetch(*random_tokens(rng, 4))
    with pytest.raises(ValueError, match="tq3"):
        second.update_and_fetch(*random_tokens(rng, 4))
    assert issubclass(PoolFullError, PoolError)


def test_neighbouring_blocks_are_read_in_one_piece():
    slab = 1 << 24
    assert runs([3, 4, 5, 9, slab, slab + 1]) == [(0, 3, 6), (0, 9, 10), (1, 0, 2)]


def large_pool(rng):
    """A sequence of 300 tokens in a pool whose newest slab is large: (cache, bytes of the slab)."""
    pool = Pool(1)
    (cache,) = new_cache("tq4", 128, pool=pool)
    cache.update_and_fetch(*random_tokens(rng, 300))
    pool.allocate(15)
    pool.release(pool.allocate(5_000))
    cache.reserve(1_000)
    mx.eval(cache.state, pool.slabs(0))
    return cache, pool.slabs(0)[-1].nbytes


def peak_since(held):
    return mx.get_peak_memory() - held


def restart_peak():
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def test_a_write_waits_for_the_reads_in_flight_and_copies_no_slab():
    cache, slab = large_pool(np.random.default_rng(0))
    pool, slow = cache.pool, mx.random.normal((700, 700))
    block = cache.tables[0].ids[-1]
    row = mx.ones((1, pool.layouts[0].words), mx.uint32)
    mx.eval(slow, row)
    held = restart_peak()
    read = pool.read(0, [block]) + (slow @ slow @ slow)[:1, :1].astype(mx.uint32)
    mx.async_eval(read)
    pool.write(0, [block], row)
    mx.eval(pool.slabs(0))
    assert peak_since(held) < slab / 4
    assert mx.array_equal(pool.read(0, [block]), row)


def test_packing_copies_no_slab_while_tokens_are_generated_one_ahead():
    rng = np.random.default_rng(0)
    cache, slab = large_pool(rng)
    news, last = [random_tokens(rng, 1) for _ in range(8)], None
    mx.eval(news)
    held = restart_peak()
    for step in range(260):
        cache.update_and_fetch(*news[step % 8])
        out = cache.attend(mx.ones((1, 2, 1, 64)), 0.1, None)
        mx.async_eval(out)
        if last is not None:
            mx.eval(last)
        last = out
    mx.eval(last)
    assert cache.packed == [3]
    assert peak_since(held) < slab / 4


@pytest.fixture(scope="module")
def eight(demo):
    """One sequence of 40,000 and seven of 1,000 tokens, filled as `bench speed` fills."""
    from tqstack.attention import make_turboquant_cache

    caches = []
    for length in (40_000, *[1_000] * 7):
        caches.append(make_turboquant_cache(demo.model))
        fill(demo.model, caches[-1], length)
    return caches


def softmax_layers(caches):
    return [[c for c in cache if isinstance(c, TurboQuantKVCache)] for cache in caches]


def peak_of(action, *held):
    """(result, bytes that it took at most beyond what was held)."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = action()
    mx.eval([cache.state for cache in result])
    mx.synchronize()
    return result, mx.get_peak_memory() - before


def test_a_batch_holds_what_its_sequences_hold_alone_and_nothing_is_copied(eight):
    caches = softmax_layers(eight)
    alone = sum(c.nbytes for cache in caches for c in cache)
    room = caches[0][0].pool.block_bytes + 16e6
    layers = range(len(caches[0]))

    def join():
        return [TurboQuantKVCache.merge([cache[layer] for cache in caches]) for layer in layers]

    batch, peak = peak_of(join)
    assert peak < room
    assert sum(c.nbytes for c in batch) == pytest.approx(alone, rel=0.03)
    for cache in batch:  # a step, so that it is a batch that generates
        keys, values = random_tokens(np.random.default_rng(0), 1, batch=8, dim=256)
        cache.update_and_fetch(keys, values)
        mx.eval(cache.attend(mx.ones((8, 4, 1, 256)), 0.1, None), cache.state)
    _, peak = peak_of(lambda: [cache.extract(0) for cache in batch])
    assert peak < room

    def leave():
        for cache in batch:
            cache.filter([0, *range(2, 8)])
        return batch

    _, peak = peak_of(leave)
    assert peak < room

    def join_again():
        for cache, one in zip(batch, caches[1], strict=True):
            cache.extend(TurboQuantKVCache.merge([one]))
        return batch

    _, peak = peak_of(join_again)
    assert peak < room
    assert [len(cache.lengths) for cache in batch] == [8, 8]
    batch[0].pool.check_integrity()
