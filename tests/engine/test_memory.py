"""Memory is bounded after every step and within it, whatever jobs wish."""

from __future__ import annotations

import queue
import random
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.books import check, empty, limited
from engine.jobs import finished
from tqstack.engine import caches
from tqstack.engine.budget import SMALLEST_CHUNK
from tqstack.engine.disk import DiskStore
from tqstack.engine.grammar import Grammar
from tqstack.engine.jobs import Job, Removed
from tqstack.engine.sampling import GREEDY, Sampling
from tqstack.engine.wishes import MEASURED_CHUNK
from tqstack.engine.worker import Worker
from tqstack.models.drafts import NONE

LIVE = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EVERYTHING = Sampling(
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    seed=1,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias=((3, 1.0),),
)


@LIVE
@given(
    st.integers(0, 2**32),
    st.sampled_from([700, 1500]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([SMALLEST_CHUNK, None]),
)
def test_memory_stays_within_the_budget_after_every_step(
    tiny, noise, seed, tokens, sequences, chunk
):
    drive(tiny(), noise, seed, tokens, sequences, chunk)


@pytest.mark.parametrize("chunk", [SMALLEST_CHUNK, None])
def test_memory_stays_within_the_budget_on_the_demo_model(runtime, text, chunk):
    drive(runtime, text, 1, 1500, 2, chunk, forms=True, rounds=7)


def test_memory_stays_within_the_budget_with_a_large_vocabulary(tiny, noise):
    drive(tiny("llama", vocabulary=50_000), noise, 2, 1500, 4, SMALLEST_CHUNK)


def test_memory_stays_within_the_budget_while_prefixes_are_written(tiny, noise, tmp_path):
    runtime = tiny()
    disk = DiskStore(tmp_path, 1 << 30, runtime.fingerprint)
    drive(runtime, noise, 5, 1500, 2, disk=disk)
    disk.close()
    assert disk.written


def drive(runtime, text, seed, tokens, sequences, chunk=None, forms=False, disk=None, rounds=14):
    """Prompts of any length come and go; books, bytes and answers are checked all the while."""
    rng = random.Random(seed)
    worker = Worker(limited(runtime, tokens, sequences, chunk=chunk), gap=0.2, disk=disk)
    mx.clear_cache()
    others = mx.get_active_memory() - runtime.plan.weights
    mx.reset_peak_memory()
    jobs, gone = [], set()
    for _ in range(rounds):
        for _ in range(rng.randint(0, 3)):
            jobs += submitted(worker, rng, text, tokens, forms)
        if jobs and rng.random() < 0.3:
            job, _ = rng.choice(jobs)
            gone.add(job.id)
            worker.cancel(job)
            check(worker)
        for _ in range(rng.randint(1, 12)):
            if worker.busy:
                worker.step()
                check(worker)
            else:
                worker.rest()
    while worker.busy:
        worker.step()
        check(worker)
    assert mx.get_peak_memory() - others <= worker._budget.limit
    for job, events in jobs:
        last = None
        while not events.empty():
            last = events.get()
        if isinstance(last, Removed):
            assert job.id in gone
        elif not getattr(last, "finish_reason", None):
            assert last.error.code == "insufficient_memory"
            assert job.longest > tokens or job.prompt_logprobs is not None
    assert empty(worker)


def submitted(worker, rng, text, tokens, forms):
    """A prompt with some wish; its jobs, and where their events come."""
    start = rng.choice([0, 0, 400, rng.randint(0, 30_000)])
    prompt = text[start : start + rng.randint(2, tokens)]
    plain = Sampling(temperature=rng.choice([0.0, 1.0]), seed=rng.randint(0, 9))
    wish = rng.choice(["plain", "plain", "sampled", "told", "echo", "answers", "form"])
    options = {
        "told": {"logprobs": 5},
        "echo": {"logprobs": 5, "prompt_logprobs": 5},
        "form": {"grammar": Grammar("regex", "[a-z ]{1,400}")} if forms else {},
    }.get(wish, {})
    sampling = EVERYTHING if wish in ("sampled", "told") else plain
    jobs = [
        (Job(prompt, rng.randint(1, 30), sampling, **options), queue.SimpleQueue())
        for _ in range(3 if wish == "answers" else 1)
    ]
    worker.submit_all([(job, events.put) for job, events in jobs])
    return jobs


@pytest.mark.parametrize("name", ["demo", "qwen3-next", "llama", "gemma4"])
def test_a_chunk_behind_a_long_prompt_takes_no_more_than_planned(runtime, tiny, text, noise, name):
    one, ids = (runtime, text) if name == "demo" else (tiny(name), noise)
    cache = one.new_cache()
    for start in range(0, 3000, 250):
        one.model(mx.array([ids[start : start + 250]]), cache=cache)
        caches.settle(cache)
    for tokens in (1, 32, 64, 128, 256):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        one.model(mx.array([ids[3000 : 3000 + tokens]]), cache=cache)
        caches.settle(cache)
        used = mx.get_peak_memory() - max(before, mx.get_active_memory())
        assert used <= one.workspace(tokens), tokens


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("drafts", [False, True])
def test_what_tokens_are_drawn_from_is_planned(tiny, eager, noise, count, drafts):
    one = tiny("llama", vocabulary=200_000)
    one = one if drafts else replace(one, drafts=NONE)
    worker = (eager if drafts else Worker)(one)
    steps = one.workspace(SMALLEST_CHUNK) + one.logits_bytes(count, 0)
    for i in range(count):
        job = Job(noise[i : i + 8] * 3, 24, EVERYTHING, logprobs=20)
        worker.submit(job, lambda event: None)
    while len(worker._model.batch) < count:
        worker.step()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(4):
        worker.step()
    assert steps / 8 < mx.get_peak_memory() - before <= steps
    assert drafts == bool(worker.status()["speculation"]["draft_tokens"])


def test_measuring_a_large_vocabularys_prompt_is_planned_or_refused(tiny, noise):
    one = tiny("llama", vocabulary=200_000)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    worker, events = Worker(one), queue.SimpleQueue()
    worker.submit(Job(noise[:100], 2, GREEDY, prompt_logprobs=20), events.put)
    finished(worker)
    measured = one.logits_bytes(1, MEASURED_CHUNK)
    used = mx.get_peak_memory() - before
    assert measured / 2 < used <= one.workspace(MEASURED_CHUNK) + measured
    small = Worker(limited(one, 200))
    small.submit(Job(noise[:100], 2, GREEDY, prompt_logprobs=20), events.put)
    small.submit(Job(noise[:100], 2, GREEDY), events.put)
    assert small.status()["requests"]["waiting"] == 1
