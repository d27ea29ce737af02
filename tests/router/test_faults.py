"""The fault table: each way for a backend to fail, streamed and not, on either backend.

For every row: who answered, what the client got, how long it took, and that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest

from router.fleet import Fleet
from router.scripted import SSE, Script, Wire, answers, chunk, delta, says, whole
from router.stack import Stack, stream_answer

LIMIT = 0.4  # of every kind, in seconds


def raw(*pieces: bytes, then: str = "close", pause: float = 0.02) -> Script:
    """Sends these bytes, then closes, resets or hangs."""

    async def script(wire: Wire) -> None:
        for piece in pieces:
            await wire.raw(piece)
            await asyncio.sleep(pause)
        if then == "hang":
            await asyncio.sleep(30)
        elif then == "cut":
            wire.cut()
        else:
            wire.writer.close()

    return script


def head(stream: bool) -> bytes:
    return SSE if stream else SSE.replace(b"text/event-stream", b"application/json")


def first(stream: bool) -> bytes:
    """A beginning of an answer, with a first token if it is a stream."""
    return head(stream) + chunk(delta("one ") if stream else whole("one ")[:20])


FACE = "\U0001f600".encode()


@dataclass
class Row:
    """A fault, and what the client gets of it streamed (`stream`) and in one piece (`plain`).

    `other`: the other backend's answer. `error`: the text so far, then an error event.
    `own`: this backend's answer. A number: an error of that status.
    """

    name: str
    script: Callable[[bool], Script]
    stream: str | int = "other"
    plain: str | int = "other"
    kind: str = ""  # how the reason names it


ROWS = [
    Row("accepts and closes", lambda s: raw(), kind="cut"),
    Row("accepts and resets", lambda s: raw(then="cut"), kind="cut"),
    Row("accepts and hangs", lambda s: raw(then="hang"), kind="timeout"),
    Row("headers, then hangs", lambda s: raw(head(s), then="hang"), kind="timeout"),
    Row("headers, then resets", lambda s: raw(head(s), then="cut"), kind="cut"),
    Row("no HTTP", lambda s: raw(b"220 smtp.example ESMTP\r\n")),
    Row("first token, then hangs", lambda s: raw(first(s), then="hang"), "error", kind="timeout"),
    Row("first token, then resets", lambda s: raw(first(s), then="cut"), "error"),
    Row("cut in a chunk", lambda s: raw(first(s), b"ff\r\ndata: {", then="cut"), "error"),
    Row(
        "cut in a UTF-8 character",
        lambda s: raw(first(s), chunk(b'data: {"choices": [{"delta": {"content": "' + FACE[:2])),
        "error",
    ),
    Row(
        "ends without a finish reason",
        lambda s: raw(first(s), b"0\r\n\r\n"),
        "error",
    ),
    Row(
        "done without a finish reason",
        lambda s: raw(first(s), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"),
        "error",
    ),
    Row(
        "done, and nothing else",
        lambda s: raw(head(s), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"),
    ),
    Row(
        "an error event first",
        lambda s: raw(head(s), chunk(b'data: {"error": {"message": "oh"}}\n\n'), b"0\r\n\r\n"),
    ),
    Row(
        "an error event in the middle",
        lambda s: raw(first(s), chunk(b'data: {"error": {"message": "oh"}}\n\n'), b"0\r\n\r\n"),
        "error",
    ),
    Row("500 with JSON", lambda s: answers(500, b'{"error": "boom"}'), kind="status-500"),
    Row("500 with text", lambda s: answers(500, b"boom", "text/plain"), kind="status-500"),
    Row("502 with HTML", lambda s: answers(502, b"<h1>no</h1>", "text/html"), kind="status-502"),
    Row("503", lambda s: answers(503, b"", retry_after="7"), kind="status-503"),
    Row("503 with JSON", lambda s: answers(503, b'{"error": "busy"}'), kind="status-503"),
    Row(
        "429 with JSON",
        lambda s: answers(429, b'{"error": {"message": "slow"}}'),
        kind="status-429",
    ),
    Row("429 with text", lambda s: answers(429, b"slow", "text/plain"), kind="status-429"),
    Row("404", lambda s: answers(404, b'{"error": {"message": "gone"}}'), kind="status-404"),
    Row("a redirect", lambda s: answers(302, b"", location="http://x/"), kind="status-302"),
    Row("400", lambda s: answers(400, b'{"error": {"message": "bad"}}'), 400, 400),
    Row(
        "the other content type",
        lambda s: answers(200, whole("x")) if s else answers(200, delta("x"), "text/event-stream"),
        kind="garbled",
    ),
    Row("HTML with 200", lambda s: answers(200, b"<p>hi", "text/html")),
    Row("JSON that is none", lambda s: answers(200, b'{"choices": [')),
    Row("an error with 200", lambda s: answers(200, b'{"error": "oh"}')),
    Row(
        "a slow trickle",
        lambda s: (
            raw(
                SSE,
                *(chunk(delta(word)) for word in ("own ", "answer")),
                chunk(delta("", "stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n",
                pause=LIMIT / 4,
            )
            if s
            else raw(
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(whole("own answer")),
                whole("own answer")[:30],
                whole("own answer")[30:],
                pause=LIMIT / 4,
            )
        ),
        "own",
        "own",
    ),
    Row(
        "gzip, though nobody asked",
        lambda s: answers(
            200,
            gzip.compress(
                delta("own answer", "stop") + b"data: [DONE]\n\n" if s else whole("own answer")
            ),
            "text/event-stream" if s else "application/json",
            content_encoding="gzip",
        ),
        "own",
        "own",
    ),
    Row(
        "one line of 10 MB",
        lambda s: (
            raw(
                SSE,
                chunk(delta("own answer")),
                chunk(delta("", x="y" * 10_000_000)),
                chunk(delta("", "stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n",
            )
            if s
            else answers(200, whole("own answer")[:-1] + b', "x": "%s"}' % (b"y" * 10_000_000))
        ),
        "own",
        "own",
    ),
]


@pytest.fixture(scope="module")
def stack():
    limits = {
        "router_first_token_seconds": LIMIT,
        "router_stall_seconds": LIMIT,
        "router_answer_seconds": LIMIT,
    }
    # So that a long prompt is known by its prefix and adds no time to the limits.
    with Stack(**limits) as stack:
        yield stack


def settle(stack: Stack) -> None:
    """The router has recovered, and nothing of the last request is left."""
    stack.settle()
    for backend in stack.app.state.services.backends.values():
        assert backend.load.running == 0
        backend.load.breaker.succeeded()
    stack.probe()


@pytest.mark.parametrize("backend", ["sidecar", "ollama"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_fault_has_its_known_outcome(stack, row, stream, backend):
    faulty = getattr(stack, backend)
    sound = stack.ollama if backend == "sidecar" else stack.sidecar
    settle(stack)
    faulty.script, sound.script = row.script(stream), says("other ", "answer")
    sound.seen.clear()
    began = time.monotonic()
    response = stack.chat(model=f"{backend}:", stream=stream)
    seconds = time.monotonic() - began
    expected = row.stream if stream else row.plain

    answered_by = response.headers["x-tqstack-backend"]
    text, error = ("", None)
    if response.status_code != 200:
        error = response.json()["error"]
    elif stream:
        text, error = stream_answer(response)
    else:
        text = response.json()["choices"][0]["message"]["content"]

    if expected == "other":
        assert (text, error) == ("other answer", None)
        assert (answered_by, response.headers["x-tqstack-fallback-from"]) == (sound.name, backend)
        assert row.kind in response.headers["x-tqstack-reason"]
    elif expected == "own":
        assert (text, error, answered_by) == ("own answer", None, backend)
    elif expected == "error":
        assert text == "one "
        assert error and set(error) == {"message", "type", "param", "code"}
        assert answered_by == backend
        assert "[DONE]" not in response.text
        assert sound.seen == []
    else:
        assert response.status_code == expected
        assert error and answered_by == backend
        assert sound.seen == []
    assert seconds < 4 * LIMIT
    settle(stack)


@pytest.mark.parametrize("backend", ["sidecar", "ollama"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_a_backend_that_died_since_its_probe_refuses_and_is_replaced(stack, stream, backend):
    dead, sound = getattr(stack, backend), stack.ollama if backend == "sidecar" else stack.sidecar
    sound.script = says("other ", "answer")
    settle(stack)
    stack.run(dead.stop())
    try:
        response = stack.chat(model=f"{backend}:", stream=stream)
        headers = response.headers
        assert (headers["x-tqstack-backend"], headers["x-tqstack-fallback-from"]) == (
            sound.name,
            backend,
        )
        assert headers["x-tqstack-reason"] in (f"prefix; {backend} refused", f"{backend}-down")
        assert "other" in response.text
    finally:
        stack.run(dead.start())
        settle(stack)


@pytest.mark.parametrize("backend", ["sidecar", "ollama"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("end", ["close", "cut"])
def test_a_kept_connection_closed_at_reuse_is_replaced_without_a_trace(stack, end, stream, backend):
    async def script(wire: Wire) -> None:
        if wire.reused:
            await raw(then=end)(wire)
        else:
            await says("own ", "answer")(wire)

    settle(stack)  # the probe's connection is the one that is used again
    tricky = getattr(stack, backend)
    tricky.script = script
    tricky.seen.clear()
    response = stack.chat(model=f"{backend}:", stream=stream)
    assert "own" in response.text
    assert response.headers["x-tqstack-backend"] == backend
    assert "x-tqstack-fallback-from" not in response.headers
    assert len(tricky.seen) == 2
    settle(stack)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_with_no_other_backend_each_fault_is_an_error_in_the_envelope(stream):
    limits = {"router_first_token_seconds": LIMIT, "router_answer_seconds": LIMIT}
    with Stack(sidecar_enabled="0", **limits) as stack:
        for row in ROWS:
            if (row.stream if stream else row.plain) != "other":
                continue
            settle(stack)
            stack.ollama.script = row.script(stream)
            response = stack.chat(stream=stream)
            error = response.json()["error"]
            assert response.status_code >= 400, row.name
            assert set(error) == {"message", "type", "param", "code"}, row.name
            assert "no other backend" in error["message"], row.name
            if row.name == "503":
                assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("victim", ["sidecar", "ollama"])
def test_a_killed_backends_streams_without_a_byte_are_answered(victim):
    """Half of the streams have had a token when the backend dies, half have not."""
    arrived = 0

    async def script(wire: Wire) -> None:
        nonlocal arrived
        arrived += 1
        if arrived % 2:
            await wire.raw(first(True))
        await asyncio.sleep(30)

    async def ask(client: httpx.AsyncClient, url: str) -> httpx.Response:
        body = {"model": f"{victim}:", "messages": [{"role": "user", "content": "hi"}]}
        return await client.post(url, json={**body, "stream": True})

    async def load(stack: Stack) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            url = stack.url + "/v1/chat/completions"
            requests = [asyncio.ensure_future(ask(client, url)) for _ in range(32)]
            while arrived < 32:
                await asyncio.sleep(0.01)
            await getattr(stack, victim).stop()
            return await asyncio.gather(*requests)

    with Stack() as stack:
        getattr(stack, victim).script = script
        sound = stack.ollama if victim == "sidecar" else stack.sidecar
        sound.script = says("other ", "answer")
        outcomes = [
            (r.headers["x-tqstack-backend"], *stream_answer(r)) for r in stack.run(load(stack))
        ]
        answered = [o for o in outcomes if o == (sound.name, "other answer", None)]
        broken = [o for o in outcomes if o[0] == victim and o[1] == "one " and o[2]]
        assert (len(answered), len(broken)) == (16, 16)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_each_fault_leads_on_to_the_next_backend_until_one_answers(tmp_path, stream):
    """Every row's fault at the first two of four; the third refuses connections."""
    limits = {"router_first_token_seconds": LIMIT, "router_answer_seconds": LIMIT}
    names = ("first", "second", "third", "last")
    entries = {name: {"priority": place} for place, name in enumerate(names)}
    with Fleet(tmp_path, {**limits, "router_stall_seconds": LIMIT}, **entries) as fleet:
        for row in ROWS:
            if (row.stream if stream else row.plain) != "other" or row.kind == "timeout":
                continue
            settle(fleet)
            fleet["first"].script = fleet["second"].script = row.script(stream)
            fleet["last"].script = says("last")
            fleet.run(fleet["third"].stop())
            response = fleet.chat(model="first:", stream=stream)
            assert "last" in response.text, row.name
            headers = response.headers
            assert headers["x-tqstack-backend"] == "last", row.name
            assert headers["x-tqstack-fallback-from"] == "first", row.name
            assert headers["x-tqstack-reason"].count(row.kind) >= 2, row.name
            # With all of them failing, the last one's error is the answer, and each was asked once.
            for name in names:
                fleet[name].seen.clear()
            fleet["last"].script = answers(500, b'{"error": "the last one\'s"}')
            response = fleet.chat(model="first:", stream=stream)
            assert (response.status_code, "the last one's" in response.text) == (500, True)
            assert [len(fleet[name].seen) for name in names if name != "third"] == [1, 1, 1]
            fleet.run(fleet["third"].start())
