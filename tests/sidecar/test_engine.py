"""The engine by itself: many jobs, none lost, whatever happens to one of them."""

from __future__ import annotations

import queue
from dataclasses import replace

import pytest

from sidecar.jobs import answer, submit
from tqstack.models.runtime import load_runtime
from tqstack.settings import Settings
from tqstack.sidecar.engine import Engine


@pytest.fixture(scope="module")
def runtime():
    return load_runtime(Settings(sidecar_model="demo"))


@pytest.fixture
def engine(runtime):
    engine = Engine(lambda: runtime)
    engine.start()
    yield engine
    engine.close()


def test_the_plan_is_what_the_cache_holds(runtime):
    per_vector = 130  # 256 values of 4 bits, and a norm
    assert runtime.plan.per_token == 2 * 2 * 2 * per_vector
    assert runtime.plan.per_token_fp16 == 2 * 2 * 2 * 512
    assert runtime.plan.tail == (128 + 128 + 8) * 2 * 2 * 2 * 256 * 4  # float32 on a CPU
    assert runtime.plan.recurrent > 6 * 8 * 64 * 64 * 4  # six float32 states, and convolutions


def test_a_job_that_cannot_fit_in_memory_is_refused_before_its_prefill(runtime):
    plan = runtime.plan
    small = replace(plan, budget=plan.weights + plan.workspace + plan.tail + 2_000_000)
    engine = Engine(lambda: replace(runtime, plan=small))
    engine.start()
    try:
        _, events = submit(engine, range(5000))
        error = answer(events)
        assert (error.status, error.code) == (503, "insufficient_memory")
        _, events = submit(engine, range(10), max_tokens=3)
        assert len(answer(events)) == 3
    finally:
        engine.close()


def test_a_cancelled_job_makes_room_and_disturbs_no_other(engine):
    expected = answer(submit(engine, range(40, 60))[1])
    long, _ = submit(engine, range(100, 130), max_tokens=5000)
    _, events = submit(engine, range(40, 60))
    assert answer(events) == expected
    engine.cancel(long)
    engine.cancel(long)
    _, events = submit(engine, range(40, 60))
    assert answer(events) == expected
    assert engine.status()["requests"]["running"] == 0


def test_a_step_that_fails_is_told_to_its_jobs_and_the_engine_goes_on(engine, monkeypatch):
    expected = answer(submit(engine, range(40, 60))[1])

    def broken():
        raise RuntimeError("out of luck")

    _, events = submit(engine, range(5), max_tokens=5000)
    assert isinstance(events.get(timeout=60), object)
    monkeypatch.setattr(engine._generator, "next", broken)
    error = answer(events)
    assert error.status == 500 and "out of luck" in error.message
    assert error.headers["x-should-retry"] == "false"
    assert answer(submit(engine, range(40, 60))[1]) == expected


def test_closing_tells_those_who_wait(runtime):
    engine = Engine(lambda: runtime)
    engine.start()
    _, events = submit(engine, range(5), max_tokens=30_000)
    events.get(timeout=60)
    engine.close()
    assert "shutting down" in answer(events).message


def test_a_model_that_cannot_be_loaded_is_reported_and_jobs_are_refused():
    failures = queue.SimpleQueue()

    def load():
        raise ValueError("no such model")

    engine = Engine(load, failures.put)
    engine.start()
    assert "no such model" in str(failures.get(timeout=10))
    _, events = submit(engine, [1])
    assert answer(events).status == 503
    engine.close()


def test_a_thread_that_fails_tells_everybody_and_lets_the_process_end(runtime, monkeypatch):
    failures = queue.SimpleQueue()
    engine = Engine(lambda: runtime, failures.put)
    engine.start()
    try:
        _, events = submit(engine, range(20), max_tokens=20_000)
        events.get(timeout=60)

        def broken(job):
            raise RuntimeError("books do not agree")

        monkeypatch.setattr(engine, "_insert", broken)
        _, fatal = submit(engine, range(5))
        assert "books do not agree" in str(failures.get(timeout=60))
        assert answer(events).status == answer(fatal).status == 500
        assert engine.error == "RuntimeError: books do not agree"
        _, late = submit(engine, range(5))
        assert answer(late).status == 503
    finally:
        engine.close()


def test_a_job_that_fits_only_alone_waits_for_the_others_and_is_not_refused(runtime):
    room = 300 * runtime.plan.per_token + 2 * (runtime.plan.recurrent + runtime.plan.tail)
    plan = replace(runtime.plan, budget=runtime.plan.weights + runtime.plan.workspace + room)
    engine = Engine(lambda: replace(runtime, plan=plan))
    engine.start()
    try:
        first, short = submit(engine, range(40, 60), max_tokens=40)
        second, long = submit(engine, range(200), max_tokens=50)
        gone, _ = submit(engine, range(200), max_tokens=50)
        engine.cancel(gone)
        assert len(answer(short)) == 40
        assert len(answer(long)) == 50
        assert second.first_token > first.ended
        assert engine.status()["requests"] == {"running": 0, "waiting": 0, "context_tokens": []}
    finally:
        engine.close()


def test_prompts_are_processed_together_only_as_far_as_their_workspaces_fit(runtime):
    """Room for the weights, a batch of caches, and one workspace: one prompt at a time."""
    caches = 3 * runtime.plan.request_bytes(2000)
    tight = replace(
        runtime.plan, budget=runtime.plan.weights + int(1.5 * runtime.plan.workspace) + caches
    )
    engine = Engine(lambda: replace(runtime, plan=tight))
    engine.start()
    try:
        events = [submit(engine, range(10, 1510))[1] for _ in range(3)]
        most = 0
        while engine.status()["requests"]["waiting"]:
            jobs = list(engine._jobs.values())
            most = max(most, sum(not job.generated for job in jobs))
        answers = [answer(one) for one in events]
        assert most == 1 and len(answers[0]) == 8 and answers[0] == answers[1] == answers[2]
    finally:
        engine.close()
