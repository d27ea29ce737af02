"""A sequence's cache, one entry per layer, as the engine handles it: copied, batched, measured.

Compressed entries share their blocks with whatever they were copied from. Of mlx-lm's own entries
(recurrent states, windows, plain keys and values) copies share arrays, which MLX copies when one of
them is written to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import _BaseCache

from tqstack.attention.cache import TurboQuantKVCache

Cache = list[Any]


def fork(cache: Cache) -> Cache:
    """The same tokens; what is done to one does not show in the other."""
    return [
        copy.deepcopy(entry)
        if isinstance(entry, TurboQuantKVCache)
        else _mapped(entry, lambda x: x[:] if x.ndim else x)
        for entry in cache
    ]


def row(cache: Cache, i: int) -> Cache:
    """One sequence of a batch, in arrays of its own: a slice would keep the whole batch's."""
    found = [
        entry.extract(i)
        if isinstance(entry, TurboQuantKVCache)
        else _mapped(entry.extract(i), _owned)
        for entry in cache
    ]
    settle(found)
    return found


def merged(caches: Sequence[Cache]) -> Cache:
    """Single sequences as a batch, layer by layer, so that only one layer is held twice."""
    batch = []
    for entries in zip(*caches, strict=True):
        batch.append(type(entries[0]).merge(list(entries)))
        settle(batch[-1:])
    return batch


def extend(batch: Cache, cache: Cache) -> None:
    """Take a single sequence into a batch."""
    for entry, other in zip(batch, cache, strict=True):
        entry.extend(type(other).merge([other]))
        settle([entry])


def keep(batch: Cache, rows: Sequence[int]) -> None:
    """Only these sequences stay in the batch."""
    for entry in batch:
        entry.filter(list(rows))
        settle([entry])


def settle(cache: Cache) -> None:
    """Compute what has been stored, and let go of what was needed for it."""
    mx.eval([x for entry in cache for x in _arrays(entry)])


def state_bytes(cache: Cache) -> int:
    """Bytes beside the pool's blocks: exact tails, recurrent states, windows, plain keys."""
    return sum(x.nbytes for entry in cache for x in _arrays(entry, blocks=False))


def tail_bytes(cache: Cache) -> int:
    return sum(entry.tails.nbytes for entry in cache if isinstance(entry, TurboQuantKVCache))


def blocks(cache: Cache, i: int = 0) -> tuple[int, ...]:
    """The pool's blocks that sequence i holds."""
    for entry in cache:
        if isinstance(entry, TurboQuantKVCache):
            return entry.tables[i].ids
    return ()


def compressed(cache: Cache) -> list[TurboQuantKVCache]:
    return [entry for entry in cache if isinstance(entry, TurboQuantKVCache)]


def _arrays(entry: Any, blocks: bool = True) -> list[mx.array]:
    if isinstance(entry, TurboQuantKVCache):
        return entry.settle() if blocks else entry.tails.held()
    found = [x for _, x in tree_flatten(_content(entry)) if isinstance(x, mx.array)]
    return [x for x in found if x.size]


def _content(entry: Any) -> Any:
    """What an entry of mlx-lm's holds; entries within it (`CacheList`) opened."""
    return tree_map(
        lambda x: _content(x) if isinstance(x, _BaseCache) else x,
        {name: value for name, value in vars(entry).items() if value is not None},
    )


def _mapped(entry: Any, change: Any) -> Any:
    """A copy of one of mlx-lm's entries with its arrays changed."""

    def of(x: Any) -> Any:
        if isinstance(x, _BaseCache):
            return _mapped(x, change)
        return change(x) if isinstance(x, mx.array) else x

    new = copy.copy(entry)
    for name, value in vars(entry).items():
        setattr(new, name, tree_map(of, value))
    return new


def _owned(x: mx.array) -> mx.array:
    return mx.take(x, mx.arange(x.shape[0]), axis=0) if x.ndim else x
