"""A worker with little memory, and its books held against what is really there."""

from __future__ import annotations

from dataclasses import replace

from tqstack.engine import caches


def limited(runtime, tokens, sequences=1, prefixes=64 << 20, chunk=None, **changes):
    """The runtime with room for so many sequences of so many tokens, read in chunks of such a size;
    None: full ones."""
    plan, steps = runtime.plan, runtime.workspace(chunk or runtime.prefill_step)
    steps += runtime.logits_bytes(sequences, 0)
    room = sequences * plan.request_bytes(tokens) + steps
    small = replace(plan, budget=plan.weights + room + (1 << 20))
    return replace(runtime, plan=small, prefix_cache_bytes=prefixes, **changes)


def check(worker):
    """Every book agrees with what is held, and all of it fits."""
    pool, budget, store = worker._pool, worker._budget, worker._prefixes.store
    pool.check_integrity()
    assert sum(worker.memory()["parts"].values()) <= budget.limit
    assert budget.committed <= budget.limit
    assert pool.blocks_free >= budget._due()
    assert store.state_bytes == sum(n.checkpoint.state_bytes for n in store.nodes())
    assert store.nbytes <= store.limit
    running = [t.running for t in worker._tracked.values() if t.running is not None]
    held = {block for one in running for block in worker._model.blocks_of(one)}
    held |= {block for node in store.nodes() for block in node.checkpoint.blocks}
    copies = [t.fork._cache for t in worker._tracked.values() if t.fork and t.fork.ready]
    held |= {block for cache in copies for block in caches.blocks(cache)}
    assert pool.blocks_used == len(held)


def empty(worker):
    """Whether nothing is left behind but prefixes, and nothing without them."""
    assert not worker.busy and not worker._model.batch and not worker._budget._promises
    worker._prefixes.store.clear()
    return worker._pool.blocks_used == 0
