"""Backends that hang while a request waits for a whole answer, and such as only take their time."""

from __future__ import annotations

import asyncio
import time

import pytest

from router.scripted import Wire, says, whole
from router.stack import Stack, answer_of, stream_answer
from tqstack.router import upstream
from tqstack.router.backends import probe

HUNG = 0.4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(upstream, "_LOOK_SECONDS", 0.05)


async def hangs(wire: Wire) -> None:
    await asyncio.sleep(30)


def hang_at_the_next_request(stack: Stack, name: str) -> None:
    """From then on it accepts, and answers nothing any more, probes included."""
    stack.probe()
    backend = getattr(stack, name)

    async def script(wire: Wire) -> None:
        backend.silent = True
        await hangs(wire)

    backend.script = script


@pytest.mark.parametrize("name", ["sidecar", "ollama"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_a_backend_that_hangs_on_everything_is_left_within_seconds(name, stream):
    other = "ollama" if name == "sidecar" else "sidecar"
    with Stack(router_hung_seconds=HUNG) as stack:
        hang_at_the_next_request(stack, name)
        getattr(stack, other).script = says("other ", "answer")
        began = time.monotonic()
        response = stack.chat(model=f"{name}:", stream=stream)
        assert time.monotonic() - began < 3
        assert response.headers["x-tqstack-backend"] == other
        assert response.headers["x-tqstack-reason"] == f"prefix; {name} hung"
        if stream:
            assert stream_answer(response) == ("other answer", None)
        else:
            assert answer_of(response) == ("other answer", other, name)
        stack.settle()
        assert getattr(stack, name).seen[0].closed_at


def test_with_nobody_else_the_client_is_told_why():
    with Stack(sidecar_enabled="0", router_hung_seconds=HUNG) as stack:
        hang_at_the_next_request(stack, "ollama")
        response = stack.chat()
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (503, "backend_hung")
        assert "nor its probes" in error["message"]
        assert response.headers["retry-after"]


def test_a_healthy_backend_may_take_its_time():
    async def slow(wire: Wire) -> None:
        await asyncio.sleep(4 * HUNG)
        await wire.answer(200, whole("own answer"))

    with Stack(router_hung_seconds=HUNG) as stack:
        stack.ollama.script = slow
        assert answer_of(stack.chat()) == ("own answer", "ollama", None)
        # Also one that others are served by meanwhile.
        stack.sidecar.script = slow
        stack.sidecar.health["requests"] = {"running": 1, "waiting": 0}
        assert answer_of(stack.chat(model="tq:")) == ("own answer", "sidecar", None)


def test_a_sidecar_at_work_that_makes_no_progress_is_left():
    with Stack(router_first_token_seconds=HUNG) as stack:
        stack.sidecar.health |= {"requests": {"running": 1, "waiting": 0}, "last_step_at": 100.0}
        stack.sidecar.script = hangs
        response = stack.chat(model="tq:")
        assert answer_of(response)[1:] == ("ollama", "sidecar")
        assert response.headers["x-tqstack-reason"] == "prefix; sidecar hung"


def test_a_sidecar_that_makes_progress_is_waited_for():
    with Stack(router_first_token_seconds=HUNG) as stack:

        async def reads_a_long_prompt(wire: Wire) -> None:
            for step in range(16):
                report = {"requests": {"running": 1, "waiting": 0}, "last_step_at": 100.0 + step}
                stack.sidecar.health |= report
                await asyncio.sleep(HUNG / 4)
            await wire.answer(200, whole("own answer"))

        stack.sidecar.script = reads_a_long_prompt
        assert answer_of(stack.chat(model="tq:")) == ("own answer", "sidecar", None)
