"""The client's side of an exchange, on bare ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.sse import comment, event
from tqstack.router.dialects import Dialect, Stream

Headers = Iterable[tuple[bytes, bytes]]
_EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Client:
    """Sends to the client, and knows whether it is still there.

    Attributes:
        started: the status and headers are out.
        answered: bytes of an answer are out, so that no other backend can answer any more.
        finished: the last byte is out.
        gone: the client closed its connection.
        stream: writes the events of an API other than chat.
    """

    def __init__(self, receive: Any, send: Any, dialect: Dialect | None = None):
        self._receive = receive
        self._send = send
        self._dialect = dialect  # whose form errors have; OpenAI's without one
        self.started = self.answered = self.finished = self.gone = False
        self.stream: Stream | None = None
        self._pinger: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def watch(self, work: asyncio.Task[Any]) -> None:
        """Cancels `work` as soon as the client goes away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.finished:
            self.gone = True
            work.cancel()

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers]})

    async def start_stream(self, headers: Headers) -> None:
        """Sends the headers of an event stream, unless a ping has sent them."""
        if not self.started:
            await self.start(200, (*_EVENT_STREAM, *headers))

    async def send(self, data: bytes) -> None:
        self.answered = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        # First: the server then reports a disconnect, which is none.
        self.finished = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, error: ApiError, headers: Headers = ()) -> None:
        """The error as the whole answer, or as the last event of a stream that has begun."""
        dialect = self._dialect
        if self.finished:
            return
        if self.started:
            await self.finish(self.stream.fail(error) if self.stream else event(error.body))
        else:
            body = dialect.error_body(error) if dialect else error.body
            await self.json(error.status, body, (*headers, *encode(error.headers)))

    async def json(self, status: int, value: Any, headers: Headers = ()) -> None:
        body = value if isinstance(value, bytes) else orjson.dumps(value)
        await self.start(
            status,
            (
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ),
        )
        self.answered = True
        await self.finish(body)

    # Pings: comments, or an API's own events, that keep a waiting client. They are no answer.

    def ping_every(self, seconds: float, headers: Callable[[], Headers], text: Callable[[], str]):
        """Until `stop_pings`, sends a ping every so many seconds."""

        async def ping() -> None:
            while True:
                await self.start_stream(headers())
                data = self.stream.ping(text()) if self.stream else comment(text())
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
                await asyncio.sleep(seconds)

        def begin() -> None:
            self._pinger = asyncio.create_task(ping())

        self._timer = asyncio.get_running_loop().call_later(seconds, begin)

    async def note(self, text: str) -> None:
        """A comment in a stream that has begun; nothing otherwise."""
        if self.started and not self.finished:
            data = comment(text)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def stop_pings(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._pinger:
            self._pinger.cancel()
            await asyncio.wait([self._pinger])
            self._pinger = None


def encode(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
