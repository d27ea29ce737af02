"""Jobs for an engine or a worker, and what becomes of them."""

from __future__ import annotations

import queue

from tqstack.engine.jobs import Failed, Job, Token
from tqstack.engine.sampling import GREEDY


def submit(engine, tokens, max_tokens=8, sampling=GREEDY, **options):
    events = queue.SimpleQueue()
    job = Job(list(tokens), max_tokens, sampling, **options)
    engine.submit(job, events.put)
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


def finished(worker, *submitted):
    """Step until nothing runs; the answers in order."""
    while worker.busy:
        worker.step()
    return [answer(events, 0) for _, events in submitted]
