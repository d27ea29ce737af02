"""How the next token is drawn: with a seed, the same tokens whatever runs beside the request."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_logits_processors,
)


@dataclass(frozen=True)
class Sampling:
    """A request's sampling parameters, as plain data; the fields are OpenAI's, and top_k, min_p and
    repetition_penalty those of other servers. `seed` None: one that the clock gives. `logit_bias`:
    tokens, and what is added to their logits."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0

    def processors(self) -> list[Any]:
        """mlx-lm's functions of (tokens so far, logits) that penalise repetition, and prefer
        or avoid tokens."""
        return make_logits_processors(
            logit_bias=dict(self.logit_bias),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


class Sampler:
    """Log-probabilities (1, vocabulary) to a token (1,).

    It carries its own random state, so concurrent requests do not disturb each other.

    Attributes:
        state: what the next token is drawn with; None: nothing is drawn at random.
    """

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        seed = time.time_ns() if sampling.seed is None else sampling.seed
        self.state: mx.array | None = None if sampling.greedy else mx.random.key(seed % 2**64)

    def __call__(self, logprobs: mx.array) -> mx.array:
        sampling = self._sampling
        if self.state is None:
            return greedy_sampler(logprobs)
        if sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        self.state, key = mx.random.split(self.state)
        return mx.random.categorical(logprobs / sampling.temperature, key=key)


GREEDY = Sampling(temperature=0)
