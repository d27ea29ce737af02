"""The engine by itself: many jobs, none lost, whatever happens to one of them."""

from __future__ import annotations

import queue
from dataclasses import replace

import pytest

from engine.jobs import answer, submit
from tqstack.engine.engine import Engine
from tqstack.engine.worker import Worker
from tqstack.models.runtime import load_runtime
from tqstack.settings import Settings


@pytest.fixture(scope="module")
def runtime():
    return load_runtime(Settings(sidecar_model="demo"))


@pytest.fixture
def engine(runtime):
    engine = Engine(lambda: runtime)
    engine.start()
    engine.ready().result(timeout=60)
    yield engine
    engine.close()


def test_the_plan_is_what_the_cache_holds(runtime):
    per_vector = 130  # 256 values of 4 bits, and a norm
    assert runtime.plan.per_token == 2 * 2 * 2 * per_vector
    assert runtime.plan.per_token_fp16 == 2 * 2 * 2 * 512
    assert runtime.plan.tail == (128 + 128 + 8) * 2 * 2 * 2 * 256 * 4  # float32 on a CPU
    assert runtime.plan.recurrent > 6 * 8 * 64 * 64 * 4  # six float32 states, and convolutions


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
    with monkeypatch.context() as patch:
        patch.setattr(engine.worker._model, "decode", broken)
        error = answer(events)
    assert error.code == "engine_error" and "out of luck" in error.message
    assert answer(submit(engine, range(40, 60))[1]) == expected
    memory = engine.status()["memory"]
    assert memory["parts"]["sequences"] == 0 and memory["held"] <= memory["budget"]


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

    engine = Engine(load, on_failure=failures.put)
    engine.start()
    assert "no such model" in str(failures.get(timeout=10))
    _, events = submit(engine, [1])
    assert answer(events).code == "no_model"
    engine.close()


def test_a_thread_that_fails_tells_everybody_and_lets_the_process_end(runtime, monkeypatch):
    failures = queue.SimpleQueue()
    engine = Engine(lambda: runtime, on_failure=failures.put)
    engine.start()
    try:
        _, events = submit(engine, range(20), max_tokens=20_000)
        events.get(timeout=60)

        def broken(*_):
            raise RuntimeError("books do not agree")

        monkeypatch.setattr(engine.worker._scheduler, "next", broken)
        assert "books do not agree" in str(failures.get(timeout=60))
        assert answer(events).code == "engine_error"
        assert engine.error == "RuntimeError: books do not agree"
        _, late = submit(engine, range(5))
        assert answer(late).code == "no_model"
    finally:
        engine.close()


def test_a_full_queue_refuses_and_says_so(runtime):
    engine = Engine(lambda: replace(runtime, batch_size=1), lambda r: Worker(r, queue=2))
    engine.start()
    try:
        running, events = submit(engine, range(20), max_tokens=20_000)
        events.get(timeout=60)
        waiting = [submit(engine, range(20, 40)) for _ in range(3)]
        refused = answer(waiting[2][1])
        assert refused.code == "queue_full" and "2 requests wait" in refused.message
        engine.cancel(running)
        assert len(answer(waiting[0][1])) == len(answer(waiting[1][1])) == 8
    finally:
        engine.close()
