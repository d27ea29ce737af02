"""The client towards the backends, on raw sockets."""

from __future__ import annotations

import asyncio
import gzip

import pytest
import uvloop

from tqstack.router.upstream import Upstream, UpstreamError

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def talk(serve, work):
    """Runs `work(upstream, url)` beside a server that hands every connection to `serve`."""

    async def main():
        connections = []

        async def on_connection(reader, writer):
            connections.append(writer)
            try:
                await serve(reader, writer, len(connections))
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        upstream = Upstream(connect_seconds=1)
        try:
            port = server.sockets[0].getsockname()[1]
            return await work(upstream, f"http://127.0.0.1:{port}/x"), len(connections)
        finally:
            upstream.close()
            server.close()

    return uvloop.run(main())


def answers(*pieces: bytes, close: bool = True):
    async def serve(reader, writer, number):
        while await reader.readuntil(b"\r\n\r\n"):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
            if close:
                return

    return serve


async def fetch(upstream, url, body=b""):
    answer = await upstream.send("POST" if body else "GET", url, body, {}, 1)
    try:
        data = b""
        while piece := await answer.read(1):
            data += piece
        return answer.status, data
    finally:
        answer.close()


@pytest.mark.parametrize(
    "pieces",
    [
        [OK],
        [bytes([byte]) for byte in OK],
        [
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n",
            b"1\r\nk\r\n0\r\n\r\n",
        ],
        [b"HTTP/1.0 200 OK\r\n\r\no", b"k"],
        [b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", OK],
        [
            b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
            % len(gzip.compress(b"ok", mtime=0)),
            gzip.compress(b"ok", mtime=0),
        ],
    ],
)
def test_every_form_of_answer_is_read(pieces):
    assert talk(answers(*pieces), fetch)[0] == (200, b"ok")


@pytest.mark.parametrize(
    "pieces, kind",
    [
        ([], "cut"),
        ([b"HTTP/1.1 200"], "cut"),
        ([OK[:-1]], "cut"),
        ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab"], "cut"),
        ([b"SSH-2.0-OpenSSH_9.9\r\n"], "garbled"),
        ([b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n"], "garbled"),
        ([b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\nok"], "garbled"),
        ([b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nok"], "garbled"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(pieces, kind):
    with pytest.raises(UpstreamError) as error:
        talk(answers(*pieces), fetch)
    assert error.value.kind == kind


def test_a_connection_that_nobody_takes_is_refused():
    async def work():
        await Upstream(connect_seconds=1).send("GET", "http://127.0.0.1:1/", b"", {}, 1)

    with pytest.raises(UpstreamError) as error:
        uvloop.run(work())
    assert error.value.kind == "refused"


def test_connections_are_used_again():
    async def work(upstream, url):
        return [await fetch(upstream, url, b"{}") for _ in range(5)]

    results, connections = talk(answers(OK, close=False), work)
    assert results == [(200, b"ok")] * 5
    assert connections == 1


def test_a_pooled_connection_that_was_closed_is_replaced_without_a_trace():
    async def serve(reader, writer, number):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        if number == 1:  # take the second request, and close
            await reader.readuntil(b"\r\n\r\n")

    async def work(upstream, url):
        return [await fetch(upstream, url) for _ in range(2)]

    results, connections = talk(serve, work)
    assert results == [(200, b"ok")] * 2
    assert connections == 2


def test_a_slow_reader_slows_the_backend_down():
    sent = 0

    async def serve(reader, writer, number):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    async def work(upstream, url):
        answer = await upstream.send("GET", url, b"", {}, 1)
        await asyncio.sleep(0.3)
        before = sent
        size = 0
        while piece := await answer.read(1):
            size += len(piece)
        answer.close()
        return before, size

    (before, size), _ = talk(serve, work)
    assert before < 30_000_000
    assert size == 100_000_000


def test_closing_an_answer_early_is_seen_by_the_backend_at_once():
    async def serve(reader, writer, number):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok")
        assert await reader.read() == b""
        seen.set()

    async def work(upstream, url):
        nonlocal seen
        seen = asyncio.Event()
        answer = await upstream.send("GET", url, b"", {}, 1)
        await answer.read(1)
        answer.close()
        async with asyncio.timeout(0.5):
            await seen.wait()

    seen: asyncio.Event
    talk(serve, work)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no"])
def test_a_backend_that_falls_silent_is_given_up_after_the_limit(head):
    async def serve(reader, writer, number):
        writer.write(head)
        await reader.read()  # until we are given up

    async def work(upstream, url):
        answer = await upstream.send("GET", url, b"", {}, 0.1)
        while await answer.read(0.1):
            pass

    with pytest.raises(UpstreamError) as error:
        talk(serve, work)
    assert error.value.kind == "timeout"
