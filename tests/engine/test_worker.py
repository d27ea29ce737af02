"""The live engine on the demo model: nothing is lost, and what was kept changes no number."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.books import check, empty, limited
from engine.jobs import answer, finished, submit
from tqstack.engine.budget import SMALLEST_CHUNK
from tqstack.engine.jobs import JobError, Progress
from tqstack.engine.worker import Worker


def test_a_thousand_requests_leave_no_block_job_or_checkpoint_behind(tiny, noise):
    rng = random.Random(0)
    worker = Worker(limited(tiny(), 2000, 8, prefixes=8 << 20), queue=2000)
    jobs = []
    for i in range(1000):
        start = rng.randint(0, 30_000)
        length = rng.randint(2, 20) if i % 10 else 300
        jobs.append(submit(worker, noise[start : start + length], rng.randint(1, 2)))
        if i % 10 == 0:
            worker.cancel(jobs[rng.randint(0, i)][0])
        if i % 2:
            worker.step()
    while worker.busy:
        worker.step()
    check(worker)
    assert all(not events.empty() for _, events in jobs)
    assert empty(worker)


def test_what_does_not_fit_is_refused_at_once_with_what_would(runtime, text):
    plan = runtime.plan
    room = plan.request_bytes(1000) + runtime.workspace(SMALLEST_CHUNK)
    worker = Worker(replace(runtime, plan=replace(plan, budget=plan.weights + room)))
    _, events = submit(worker, text[:2000])
    error = answer(events, 0)
    assert isinstance(error, JobError) and error.code == "insufficient_memory"
    assert "SIDECAR_MEMORY_MB" in error.message and not worker.busy
    longest = worker._budget.longest()
    assert 1000 <= longest < 2000
    assert len(finished(worker, submit(worker, text[: longest - 8]))[0]) == 8


def test_before_a_job_is_refused_its_chunks_are_halved(runtime, text):
    plan = runtime.plan
    room = plan.request_bytes(3000) + runtime.workspace(128)
    tight = replace(runtime, plan=replace(plan, budget=plan.weights + room + (1 << 20)))
    worker = Worker(tight)
    job, events = submit(worker, text[:2500])
    worker.step()
    assert worker._budget._promises[job.id].chunk == 128
    assert len(finished(worker, (job, events))[0]) == 8


def test_a_job_that_fits_only_alone_waits_and_is_not_refused(runtime, text):
    worker = Worker(limited(runtime, 1000))
    short = submit(worker, text[:300], 40)
    worker.step()
    long = submit(worker, text[:900], 50)
    worker.step()
    assert worker.status()["requests"]["running"] == 1
    assert [len(tokens) for tokens in finished(worker, short, long)] == [40, 50]


def test_a_prefix_that_a_waiting_job_will_use_goes_last(tiny, noise):
    worker = Worker(replace(tiny(), batch_size=1))
    finished(worker, submit(worker, noise[:2000]))
    finished(worker, submit(worker, noise[5000:5800]))
    running = submit(worker, noise[8000:8400], 20)
    worker.step()
    waiting = submit(worker, noise[:2000])
    while worker._prefixes.store.evict(worker._wanted()):
        check(worker)
    assert [node.end for node in worker._prefixes.store.nodes()] == [1991]
    finished(worker, running, waiting)
    assert worker.totals["cached_tokens"] == 1991


@pytest.mark.parametrize("cancel_after", [3, 30])
def test_what_was_read_of_a_cancelled_prompt_is_kept(runtime, text, cancel_after):
    worker = Worker(runtime)
    job, _ = submit(worker, text[:2000], 2000)
    for _ in range(cancel_after):
        worker.step()
    read = len(worker._tracked[job.id].running.tokens)
    worker.cancel(job)
    assert not worker.busy
    finished(worker, submit(worker, text[:2500], 4))
    assert worker.totals["cached_tokens"] >= min(read, 1990)


def test_a_request_that_wants_no_cache_leaves_none_and_uses_none(runtime, text):
    worker = Worker(runtime)
    first = finished(worker, submit(worker, text[:900], cache_prompt=False))
    assert len(worker._prefixes.store) == 0
    finished(worker, submit(worker, text[:900]))
    again = submit(worker, text[:900], cache_prompt=False)
    assert finished(worker, again) == first and worker.totals["cached_tokens"] == 0


def test_a_step_that_fails_frees_what_its_jobs_held(runtime, text, monkeypatch):
    worker = Worker(runtime)
    jobs = [submit(worker, text[i : i + 300], 50) for i in (0, 500)]
    while not worker._model.batch or worker._scheduler._reading or worker._scheduler.waits:
        worker.step()

    def broken(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(type(worker._model), "_tell", broken)
        worker.step()
    assert {answer(events, 0).code for _, events in jobs} == {"engine_error"}
    check(worker)
    with monkeypatch.context() as patch:
        patch.setattr(type(worker._model), "read", broken)
        assert finished(worker, submit(worker, text[2000:2400]))[0].code == "engine_error"
    check(worker)
    assert len(finished(worker, submit(worker, text[:300]))[0]) == 8 and empty(worker)


def test_while_others_stream_a_prompt_takes_less_than_half_of_the_time(runtime, text):
    worker = Worker(runtime, gap=0.2)
    submit(worker, text[:100], 10_000)
    worker.step()
    worker.step()
    submit(worker, text[:16_000], 1)
    reading = decoding = 0.0
    scheduler = worker._scheduler
    read, decoded = scheduler.was_read, scheduler.decoded

    def count_read(job, tokens, seconds):
        nonlocal reading
        reading += seconds
        return read(job, tokens, seconds)

    def count_decoded(seconds):
        nonlocal decoding
        decoding += seconds
        decoded(seconds)

    scheduler.was_read, scheduler.decoded = count_read, count_decoded
    for _ in range(300):
        worker.step()
    assert 0.5 < decoding / (reading + decoding) < 0.75


def test_events_tell_how_far_a_prompt_is_and_what_was_kept(runtime, text):
    worker = Worker(runtime)
    finished(worker, submit(worker, text[:3000], 4))
    _, events = submit(worker, text[:3500], 4)
    while worker.busy:
        worker.step()
    progress = []
    while isinstance(event := events.get(), Progress):
        progress.append(event)
    assert progress[0] == Progress(2991, 3500, 2991)
    assert [one.done for one in progress] == sorted(one.done for one in progress)
