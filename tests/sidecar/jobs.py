"""Jobs for an engine, and what becomes of them."""

from __future__ import annotations

import queue

from mlx_lm.sample_utils import greedy_sampler

from tqstack.sidecar.jobs import Failed, Job, Token


def submit(engine, tokens, max_tokens=8):
    events = queue.SimpleQueue()
    job = Job([list(tokens)], max_tokens, greedy_sampler, [], events.put)
    engine.submit(job)
    return job, events


def answer(events, seconds=60):
    """The tokens of an answer, or the error."""
    tokens = []
    while True:
        event = events.get(timeout=seconds)
        if isinstance(event, Failed):
            return event.error
        if isinstance(event, Token):
            tokens.append(event.id)
            if event.finish_reason:
                return tokens
