"""An online softmax (Milakov and Gimelshein, arXiv 1805.02867): keys and values come in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from tqstack.attention.exponential import exp
from tqstack.attention.kernels.program import gpu_dialect
from tqstack.attention.tail import REVOCABLE

_FLOOR = -1e30  # below every score, and finite: exp(-inf - _FLOOR) is 0, never NaN
# Multiplications that OpenBLAS leaves to one thread. Others wait for the next product in a loop,
# and take the time of the thread that makes it.
ALONE = 1 << 18


class Softmax:
    """The running softmax of some query tokens: maximum m, denominator l, weighted values acc."""

    def __init__(self, queries: mx.array, start: int, value_dim: int, sinks: mx.array | None):
        B, kv_heads, groups, L, D = queries.shape  # (B, KV heads, groups, L, D), scaled
        self.start, self.stop = start, start + L
        self.queries = queries.reshape(B, kv_heads, groups * L, D)
        self.shape = (B, kv_heads, groups, L)
        rows = (B, kv_heads, groups * L, 1)
        self.acc = mx.zeros((*rows[:3], value_dim))
        if sinks is None:
            self.m, self.l = mx.full(rows, _FLOOR), mx.zeros(rows)
        else:
            sinks = sinks.astype(mx.float32).reshape(1, kv_heads, groups, 1, 1)
            self.m = mx.broadcast_to(sinks, (*self.shape, 1)).reshape(rows)
            self.l = mx.ones(rows)

    def fold(self, k: mx.array, v: mx.array, seen: mx.array | None, bias: mx.array | None) -> int:
        """Add a tile: k (B, KV heads, T, D), v (B, KV heads, T, Dv); masks broadcast to
        (B, KV heads, groups, L, T). Returns the bytes of its scores."""
        parts = 1 if self.shape[3] > REVOCABLE else _parts(self.queries.shape[2], k)
        scores = _scores(self.queries, k, parts)  # (B, KV heads, groups * L, T)
        if seen is not None or bias is not None:
            scores = scores.reshape(*self.shape, -1)
            scores = scores if bias is None else scores + bias
            scores = scores if seen is None else mx.where(seen, scores, -mx.inf)
            scores = scores.reshape(*self.queries.shape[:3], -1)
        m = mx.maximum(self.m, scores.max(axis=-1, keepdims=True))
        p = exp(scores - m)
        decay, weighted = exp(self.m - m), _weighted(p, v, parts)
        self.l = self.l * decay + p.sum(axis=-1, keepdims=True)
        self.acc = self.acc * decay + weighted
        self.m = m
        return p.nbytes

    @classmethod
    def of(cls, queries: mx.array, arrays: Sequence[mx.array]) -> Softmax:
        """That of queries as above, where m, l and acc are known."""
        found = cls(queries, 0, arrays[2].shape[-1], None)
        found.m, found.l, found.acc = arrays
        return found

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.m, self.l, self.acc

    def plus(self, other: Softmax | None, acc: mx.array | None) -> mx.array:
        """The softmax over the keys of both: (B, KV heads, groups, L, Dv). acc: the other's
        weighted values, in this one's domain."""
        if other is None or acc is None:
            return (self.acc / mx.maximum(self.l, 1e-30)).reshape(*self.shape, -1)
        m = mx.maximum(self.m, other.m)
        own, others = exp(self.m - m), exp(other.m - m)
        total = mx.maximum(self.l * own + other.l * others, 1e-30)
        return ((self.acc * own + acc * others) / total).reshape(*self.shape, -1)

    def take(self, rows: Sequence[int] | slice) -> Softmax:
        """The softmax of some of the B sequences."""
        if not isinstance(rows, slice) and list(rows) == list(range(self.shape[0])):
            return self
        index = rows if isinstance(rows, slice) else mx.array(list(rows))
        part = object.__new__(Softmax)
        part.start, part.stop = self.start, self.stop
        part.queries, part.m, part.l = self.queries[index], self.m[index], self.l[index]
        part.acc = self.acc[index]
        part.shape = (part.acc.shape[0], *self.shape[1:])
        return part

    @staticmethod
    def joined(parts: Sequence[Softmax]) -> Softmax:
        """The sequences of all."""
        first = parts[0]
        if len(parts) == 1:
            return first
        whole = object.__new__(Softmax)
        whole.start, whole.stop = first.start, first.stop
        for name in ("queries", "acc", "m", "l"):
            setattr(whole, name, mx.concatenate([getattr(part, name) for part in parts]))
        whole.shape = (whole.acc.shape[0], *first.shape[1:])
        return whole


def _parts(queries: int, k: mx.array) -> int:
    """Parts of the keys, so that few queries' products with them stay in one thread on a CPU."""
    keys, multiplications = k.shape[2], queries * k.shape[3]
    fitting = (n for n in range(1, keys + 1) if keys % n == 0)
    found = (n for n in fitting if multiplications * (keys // n) <= ALONE)
    return 1 if gpu_dialect() is not None else next(found, 1)


def _scores(queries: mx.array, k: mx.array, parts: int) -> mx.array:
    """(B, KV heads, queries, D) and (B, KV heads, T, D) -> (B, KV heads, queries, T)"""
    if parts == 1:
        return queries @ k.swapaxes(-1, -2)
    B, heads, T, D = k.shape
    k = k.reshape(B, heads, parts, T // parts, D)
    scores = queries[:, :, None] @ k.swapaxes(-1, -2)
    return scores.swapaxes(2, 3).reshape(B, heads, -1, T)


def _weighted(p: mx.array, v: mx.array, parts: int) -> mx.array:
    """(B, KV heads, queries, T) and (B, KV heads, T, Dv) -> (B, KV heads, queries, Dv)"""
    if parts == 1:
        return p @ v
    B, heads, T, D = v.shape
    p = p.reshape(B, heads, -1, parts, T // parts).swapaxes(2, 3)
    return (p @ v.reshape(B, heads, parts, T // parts, D)).sum(axis=2)
