"""What the model thought of its tokens: log-probabilities of its own logits, before any sampling
parameter, penalty or form has changed them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Logprob:
    """Of a token, and the likeliest tokens of its place, best first."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class DeviceLogprobs:
    """Of n tokens, on the device: (n,), (n, k) and (n, k)."""

    values: mx.array
    ids: mx.array
    tops: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        return [self.values, self.ids, self.tops]

    @cached_property
    def _host(self) -> list[np.ndarray]:
        return [np.array(x) for x in self.arrays]

    def read(self, i: int, token: int, top: int) -> Logprob:
        """The one at place i, with so many of the likeliest."""
        values, ids, tops = self._host
        best = zip(ids[i, :top].tolist(), tops[i, :top].tolist(), strict=True)
        return Logprob(token, float(values[i]), tuple(best))


def measure(logits: mx.array, tokens: mx.array, top: int) -> DeviceLogprobs:
    """(n, vocabulary) logits and the n tokens that came."""
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    values = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    if not top:
        none = mx.zeros((len(tokens), 0))
        return DeviceLogprobs(values, none.astype(mx.uint32), none)
    ids = mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top]
    tops = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-tops, axis=-1)
    return DeviceLogprobs(
        values,
        mx.take_along_axis(ids, order, axis=-1),
        mx.take_along_axis(tops, order, axis=-1),
    )
