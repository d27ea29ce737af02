"""A backend that does what a test tells it to, on a raw socket: also what no server should do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

# Paths that only some backends have, beside those of OpenAI: asked by the router for itself.
OWN_PATHS = ("/api/", "/tokenize", "/detokenize")
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    closed_at: float | None = None  # when the other side closed the connection, if it did
    finished: bool = False  # the script ran to its end

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Wire:
    """What a script writes to."""

    seen: Seen
    writer: asyncio.StreamWriter
    reused: bool = False  # there was a request on this connection before

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.raw(chunk(data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def answer(
        self, status: int, body: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def cut(self) -> None:
        """Ends the connection with a reset, as a killed process does."""
        self.writer.transport.abort()


Script = Callable[[Wire], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(text: str, finish: str | None = None, **extra: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [choice], **extra}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def usage_of(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def whole(text: str, prompt_tokens: int = 10) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = usage_of(prompt_tokens, 2)
    return json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode()


def says(*words: str) -> Script:
    """A backend in order: streams these words, or answers with them in one piece."""

    async def script(wire: Wire) -> None:
        if not wire.seen.json.get("stream"):
            await wire.answer(200, whole("".join(words)))
            return
        await wire.raw(SSE)
        for word in words:
            await wire.chunk(delta(word))
        await wire.chunk(delta("", "stop"))
        await wire.chunk(b"data: [DONE]\n\n")
        await wire.end()

    return script


def answers(status: int, body: bytes, kind: str = "application/json", **headers: str) -> Script:
    """A backend that always answers this."""

    async def script(wire: Wire) -> None:
        await wire.answer(status, body, kind, **headers)

    return script


fails = answers(500, b'{"error": "boom"}')


@dataclass
class Scripted:
    """The backend. `script` answers every POST; `health` and `models` answer the probes."""

    name: str
    script: Script
    models: list[str]
    health: dict[str, Any] = field(default_factory=lambda: {"status": "ok"})
    health_status: int = 200
    contexts: dict[str, int] = field(default_factory=dict)
    # Other paths that it answers: with this, or with what this makes of the request's body.
    extra: dict[str, Any] = field(default_factory=dict)
    silent: bool = False  # to its probes
    seen: list[Seen] = field(default_factory=list)
    probes: int = 0
    connections: int = 0
    open: int = 0
    busy: int = 0  # requests being answered
    port: int = 0
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Goes away: nobody listens any more, and every connection is reset."""
        if self._server:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self._writers.add(writer)
        try:
            reused = False
            while seen := await _read_request(reader):
                await self._answer(Wire(seen, writer, reused), reader)
                reused = True
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _answer(self, wire: Wire, reader: asyncio.StreamReader) -> None:
        seen = wire.seen
        if seen.method == "GET" or seen.path.startswith(OWN_PATHS):
            self.probes += 1
            if self.silent:
                await asyncio.sleep(30)
            if seen.path in self.extra:
                value = self.extra[seen.path]
                value = value(json.loads(seen.body or b"null")) if callable(value) else value
                await wire.answer(200, json.dumps(value).encode())
            elif seen.path.startswith(OWN_PATHS):
                await wire.answer(404, b"404 page not found", "text/plain")
            elif seen.path == "/health":
                await wire.answer(self.health_status, json.dumps(self.health).encode())
            else:
                data = [{"id": m, "context_length": self.contexts.get(m)} for m in self.models]
                await wire.answer(200, json.dumps({"data": data}).encode())
            return
        self.seen.append(seen)
        self.busy += 1
        try:
            await self._run(wire, reader)
        finally:
            self.busy -= 1

    async def _run(self, wire: Wire, reader: asyncio.StreamReader) -> None:
        seen = wire.seen
        script = asyncio.ensure_future(self.script(wire))
        # The router sends one request at a time: bytes or an end while we answer is its leaving.
        leaving = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([script, leaving], return_when=asyncio.FIRST_COMPLETED)
        if script.done():
            script.result()
            seen.finished = True
            if leaving.done() and not leaving.result():
                raise ConnectionError
            leaving.cancel()
            await asyncio.wait([leaving])
            return
        seen.closed_at = time.perf_counter()
        script.cancel()
        raise ConnectionError


async def _read_request(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, body)
