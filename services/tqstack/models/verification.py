"""Verifying drafts: a few tokens of each sequence in one step, the last of which may be taken back.

Of softmax layers the newest tokens lie exactly in the tail, which is cut. Recurrent layers keep the
state before them and what those tokens would change (`layers/drafts.py`). Nothing is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from tqstack.attention.cache import TurboQuantKVCache
from tqstack.models.layers.drafts import LAYERS, Revocable
from tqstack.models.mtp import Predicting

TRIALS = 3  # of a step's length at warm-up

Cache = list[Any]


def unsupported(model: nn.Module, cache: Cache) -> str | None:
    """Why tokens cannot be taken back from a model's cache; None: they can."""
    layers: Any = model.layers
    for i, entry in enumerate(cache[: len(layers)]):
        if type(entry) is TurboQuantKVCache:
            continue
        mixer = layers[i].get("linear_attn")
        if type(entry) is not ArraysCache or not _steps(mixer):
            return f"a {type(entry).__name__} of this model cannot take drafts back"
    return None


def _steps(mixer: Any) -> bool:
    return isinstance(mixer, LAYERS) and getattr(type(mixer), "steps", False)


def revocable(cache: Cache, counts: Sequence[int]) -> Cache:
    """What the model gets in place of a cache for a step of tokens that may be taken back: of
    sequence i the first counts[i] columns, the others are padding. `accept` ends it."""
    most = max(counts)
    padding = [most - count for count in counts]
    given = []
    for entry in cache:
        if isinstance(entry, ArraysCache):
            given.append(Revocable(entry))
        else:
            entry.prepare(lengths=counts, right_padding=padding)
            given.append(entry)
    return given


def accept(given: Cache, counts: Sequence[int], kept: Sequence[int]) -> list[mx.array]:
    """Of the counts[i] tokens of sequence i the first kept[i] >= 1 stay. Returns what is to be
    computed for that."""
    device, states = mx.array(list(kept), mx.int32), []
    for entry in given:
        if isinstance(entry, Revocable):
            entry.accept(device)
            states += entry.entry.cache
        else:
            entry.finalize()
            ends = zip(entry.lengths, counts, kept, strict=True)
            entry.keep([length - count + stays for length, count, stays in ends])
    return states


def step_seconds(model: nn.Module, new_cache: Callable[[], Cache], most: int) -> tuple[float, ...]:
    """What a step of one sequence takes on this machine, of 1 to `most` tokens: the least
    of some trials."""
    cache = new_cache()
    mx.eval(model(mx.zeros((1, 8), mx.int32), cache=cache))
    mx.eval([entry.state for entry in cache])
    found: dict[int, list[float]] = {}
    for trial in range(1 + TRIALS):  # the first compiles
        for tokens in range(1, most + 1):
            began = time.perf_counter()
            _step(model, cache, tokens)
            if trial:
                found.setdefault(tokens, []).append(time.perf_counter() - began)
    return tuple(min(found[tokens]) for tokens in range(1, most + 1))


def draft_seconds(model: Predicting, new_cache: Callable[[], Cache]) -> float:
    """What the head takes for a draft of one sequence: the least of some trials."""
    cache, token, found = new_cache(), mx.zeros(1, mx.int32), []
    mx.eval(model(mx.zeros((1, 8), mx.int32), cache=cache))
    for _ in range(1 + TRIALS):
        began = time.perf_counter()
        mx.eval(model.draft(token, cache, 1, [1]))
        found.append(time.perf_counter() - began)
    return min(found)


def _step(model: nn.Module, cache: Cache, tokens: int) -> None:
    fed = mx.zeros((1, tokens), mx.int32)
    if tokens == 1:
        mx.eval(model(fed, cache=cache).argmax(-1))
        return
    given = revocable(cache, [tokens])
    mx.eval(model(fed, cache=given).argmax(-1))
    mx.eval(accept(given, [tokens], [1]))
