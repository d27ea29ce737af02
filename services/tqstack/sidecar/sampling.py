"""How the next token is drawn: with a seed, the same tokens whatever runs beside the request."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
)

Sampler = Callable[[mx.array], mx.array]


def make_sampler(
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> Sampler:
    """Sampler of one request: log-probabilities (1, vocabulary) to a token (1,).

    It carries its own random state, so concurrent requests do not disturb each other.
    """
    if temperature == 0 or top_p == 0:
        return greedy_sampler
    state = mx.random.key((time.time_ns() if seed is None else seed) % 2**64)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal state
        if top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, top_k)
        state, key = mx.random.split(state)
        return mx.random.categorical(logprobs / temperature, key=key)

    return sample
