"""Waiting: for a first token, for a slow client, for a client that is gone, for an end."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx
import pytest

from router.scripted import SSE, Wire, delta
from router.stack import LONG, Stack, stream_answer


def test_a_long_wait_is_bridged_with_comments_and_can_still_fall_back():
    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        for done in (1, 2, 3):
            await wire.chunk(b": prefill %d/4\n\n" % done)
            await asyncio.sleep(0.1)
        wire.cut()

    with Stack(router_ping_seconds=0.08) as stack:
        stack.sidecar.script = script
        response = stack.chat(LONG, stream=True)
        text, error = stream_answer(response)
        assert (text, error) == ("from ollama", None)
        comments = [e for e in response.text.split("\n\n") if e.startswith(":")]
        assert any("prefill 2/4" in comment for comment in comments)
        # The headers were out before the fallback: a comment says what they cannot.
        assert ": sidecar failed; asking ollama" in comments


def test_progress_keeps_a_long_prefill_from_timing_out():
    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        for _ in range(8):
            await asyncio.sleep(0.1)
            await wire.chunk(b": prefill\n\n")
        await wire.chunk(delta("own answer", "stop") + b"data: [DONE]\n\n")
        await wire.end()

    with Stack(router_first_token_seconds=0.3) as stack:
        stack.sidecar.script = script
        response = stack.chat(model="tq:", stream=True)
        assert stream_answer(response) == ("own answer", None)


def test_a_slow_client_is_not_a_stalled_backend():
    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        for _ in range(300):
            await wire.chunk(delta("x" * 30_000))
        await wire.chunk(delta("", "stop") + b"data: [DONE]\n\n")
        await wire.end()

    with Stack(router_stall_seconds=0.3) as stack:
        stack.ollama.script = script
        with stack.http.stream(
            "POST",
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "stream": True},
        ) as response:
            pieces = response.iter_raw(1 << 16)
            next(pieces)
            time.sleep(1)
            rest = b"".join(pieces)
        assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("when", ["before a byte", "mid-stream", "unstreamed"])
def test_a_client_that_leaves_is_felt_by_the_backend_within_10_ms(when):
    async def script(wire: Wire) -> None:
        if when == "mid-stream":
            await wire.raw(SSE)
            await wire.chunk(delta("one "))
        began.append(wire.seen)
        await asyncio.sleep(30)

    began: list = []
    with Stack() as stack:
        stack.ollama.script = script
        delays = []
        for _ in range(5):
            began.clear()

            async def leave() -> float:
                async with httpx.AsyncClient(trust_env=False) as client:
                    body = {"messages": [{"role": "user", "content": "a"}]}
                    request = asyncio.ensure_future(
                        client.post(
                            stack.url + "/v1/chat/completions",
                            json={**body, "stream": when != "unstreamed"},
                        )
                    )
                    while not began:
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(0.02)
                    left = time.perf_counter()
                    request.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await request
                    return left

            left = stack.run(leave())
            stack.settle()
            delays.append(began[0].closed_at - left)
        assert sorted(delays)[2] < 0.01
        assert list(stack.app.state.services.journal.recent)[-1].outcome == "gone"
        # A client that leaves says nothing about the backend.
        assert stack.app.state.services.backends["ollama"].load.breaker.closed


def test_sigterm_lets_a_running_stream_end():
    async def script(wire: Wire) -> None:
        await wire.raw(SSE)
        await wire.chunk(delta("one "))
        await asyncio.sleep(0.4)
        await wire.chunk(delta("two", "stop") + b"data: [DONE]\n\n")
        await wire.end()

    async def ask_and_stop(stack: Stack) -> httpx.Response:
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
            request = asyncio.ensure_future(
                client.post(stack.url + "/v1/chat/completions", json=body)
            )
            while not stack.ollama.seen:
                await asyncio.sleep(0.01)
            stack.stop_serving()
            return await request

    with Stack() as stack:
        stack.ollama.script = script
        assert stream_answer(stack.run(ask_and_stop(stack))) == ("one two", None)


def test_a_hundred_clients_that_leave_leave_no_connection_behind():
    async def script(wire: Wire) -> None:
        await asyncio.sleep(30)

    async def crowd(stack: Stack) -> None:
        body = {"messages": [{"role": "user", "content": "a"}]}
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=20) as client:
            url = stack.url + "/v1/chat/completions"
            requests = [
                asyncio.ensure_future(client.post(url, json={**body, "stream": bool(i % 2)}))
                for i in range(100)
            ]
            while stack.ollama.busy < 100:
                await asyncio.sleep(0.01)
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)

    with Stack() as stack:
        stack.ollama.script = script
        stack.run(crowd(stack))
        stack.settle()
        deadline = time.monotonic() + 2
        while stack.ollama.open > 1:  # the probe's connection may wait in the pool
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert stack.app.state.services.backends["ollama"].load.running == 0
