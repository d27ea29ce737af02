"""mlx-lm's own caches: the quantized one, one request at a time, and the plain one in batches."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from engine.jobs import finished, submit
from tqstack.engine.worker import Worker
from tqstack.models.cache_spec import CacheSpec, Native
from tqstack.models.measure import measure
from tqstack.models.plan import Machine


def greedy(model, cache, prompt, count):
    """What mlx-lm's cache gives, token by token."""
    made, tokens = [], mx.array(prompt)[None]
    for _ in range(count):
        token = model(tokens, cache=cache)[:, -1].argmax(-1)
        made.append(token.item())
        tokens = token[None]
    return made


def test_the_quantized_cache_is_served_one_request_at_a_time(tiny, noise):
    base = tiny("qwen3", codecs=None)
    cache = CacheSpec(None, native=Native(4, 64))
    plan, _ = measure(base.spec, base.model, cache, Machine(1 << 30, 256, 4))
    worker = Worker(replace(base, cache=cache, plan=plan, batch_size=1))
    prompts = [noise[i * 500 : i * 500 + 200] for i in range(3)]
    jobs = [submit(worker, prompt, 6, cache_prompt=False) for prompt in prompts]
    most, events = 0, 0
    while worker.busy:
        worker.step()
        most, events = max(most, worker.status()["requests"]["running"]), events + 1
    assert most == 1
    for made, prompt in zip(finished(worker, *jobs), prompts, strict=True):
        assert made == greedy(base.model, cache.make(base.model), prompt, 6)


def test_the_plain_cache_is_served_in_batches_within_its_budget(tiny, noise):
    base = tiny("qwen3", codecs=None)
    plan = base.plan
    room = 2 * plan.request_bytes(1000) + plan.workspace
    worker = Worker(replace(base, plan=replace(plan, budget=plan.weights + room)))
    prompts = [noise[i * 500 : i * 500 + 180] for i in range(5)]
    jobs = [submit(worker, prompt, 30) for prompt in prompts]
    most = 0
    while worker.busy:
        worker.step()
        assert worker._budget.committed <= worker._budget.limit
        assert sum(worker.memory()["parts"].values()) <= worker._budget.limit
        most = max(most, len(worker._model.batch))
    assert most > 1
    for made, prompt in zip(finished(worker, *jobs), prompts, strict=True):
        assert made == greedy(base.model, base.new_cache(), prompt, 30)
