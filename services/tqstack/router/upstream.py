"""The one seam to the backends: send a request, read the answer as bytes, over pooled connections.

The rest of the router knows `Upstream.send` and `Response` only. It is a client of its own, on the
parser that uvicorn uses too, because this is where a proxy's time goes: the common clients take
several times as long for a request, and hide whether a connection that broke was a pooled one.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

IDLE_SECONDS = 15.0  # shorter than any server's: a connection is best closed by who would use it
# What is read ahead of the client; past it the backend has to wait.
_HIGH_WATER = 1 << 18
_LARGEST_HEAD = 1 << 16
_LARGEST_INFLATION = 1 << 20  # per read
_LOOK_SECONDS = 1.0  # how often a wait is asked whether to give up
# Why waiting for an answer makes no sense any more, if it does not.
GiveUpReason = Callable[[], str | None]


class UpstreamError(Exception):
    """The backend did not take the request, or its answer broke off.

    Attributes:
        kind: `refused` (no connection), `cut` (it ended too early), `timeout` (nothing came),
            `hung` (nothing will come) or `garbled` (it is no HTTP).
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class _Target(NamedTuple):
    """Where a URL leads, and the head of a request to it but for the body's length."""

    origin: tuple[str, int, bool]  # host, port, TLS
    head: bytes


@lru_cache(64)
def _target(method: str, url: str, headers: tuple[tuple[str, str], ...]) -> _Target:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = f"{method} {path} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers)
    origin = parts.hostname or "", parts.port or (443 if tls else 80), tls
    return _Target(origin, head.encode("latin-1"))


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, with one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.idle_since = 0.0
        self.reused = False
        self._loop = loop  # asking for the running one is a system call, before Python 3.12
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._limit = self._deadline = 0.0  # of the wait
        self._give_up_reason: GiveUpReason | None = None
        self._error: UpstreamError | None = None
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.head_done = self.done = False
        self._head_size = 0
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._until_close = self._keep_alive = False

    @property
    def usable(self) -> bool:
        return not self._closed

    @property
    def silent(self) -> bool:
        """Not one byte of an answer has come."""
        return not self.status

    def request(self, data: bytes, body: bytes, give_up_reason: GiveUpReason | None) -> None:
        self._reset()
        self._give_up_reason = give_up_reason
        # One packet for a small request; no copy of a large one.
        if len(body) < 1 << 16:
            self._transport.write(data + body)
        else:
            self._transport.writelines((data, body))

    async def wait_head(self, limit: float) -> None:
        while not self.head_done:
            await self._wait(limit)

    async def read(self, limit: float) -> bytes:
        while not self._chunks:
            if self.done:
                return b""
            await self._wait(limit)
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def _wait(self, limit: float) -> None:
        if self._error:
            raise self._error
        self._waiter = self._loop.create_future()
        self._limit, self._deadline = limit, self._loop.time() + limit
        self._look_later()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _look_later(self) -> None:
        """At the wait's end at the latest. A timer that was set for the wait before will do, if it
        comes early enough: setting one costs as much as the rest of a wait."""
        then = self._deadline
        if self._give_up_reason:
            then = min(then, self._loop.time() + _LOOK_SECONDS)
        if self._timer:
            if self._timer.when() <= then:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(then, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._waiter or self._waiter.done():
            return
        if reason := self._give_up_reason and self._give_up_reason():
            self._fail("hung", reason)
        elif self._loop.time() >= self._deadline - 0.002:  # a loop's clock counts milliseconds
            self._fail("timeout", f"nothing came for {self._limit:g} s")
        else:
            return self._look_later()
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def abort(self) -> None:
        """Closes at once; what was not sent yet is dropped."""
        self._closed = True
        self._transport.abort()
        self._stop_looking()

    def _stop_looking(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    @property
    def reusable(self) -> bool:
        return self.done and not self._closed and self._keep_alive

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        if self.done:  # bytes that nobody asked for: whatever they are, no answer of ours
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("garbled", "the answer changes the protocol")
        except httptools.HttpParserError as error:
            self._fail("garbled", f"the answer is no HTTP ({error})")
        if self._buffered > _HIGH_WATER and not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._until_close and self.head_done and exc is None:
            self.done = True
        elif not self.done and not self._error:
            reason = f" ({exc})" if exc else ""
            self._error = UpstreamError("cut", f"the connection was closed too early{reason}")
        self._stop_looking()
        self._wake()

    def _fail(self, kind: str, message: str) -> None:
        self._error = UpstreamError(kind, message)
        self.abort()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > _LARGEST_HEAD:
            raise ValueError("the answer's headers are too large")
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.head_done = self.status >= 200
        self._keep_alive = self._parser.should_keep_alive()
        self._until_close = not self.headers.keys() & {"content-length", "transfer-encoding"}

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self.head_done:
            self.done = True
        else:  # 1xx: the answer proper follows
            self._reset()


class Response:
    """A backend's answer: status and headers are there, the body is read piece by piece."""

    def __init__(self, connection: _Connection, pool: list[_Connection]):
        self.status = connection.status
        self.headers: Mapping[str, str] = connection.headers
        self._connection = connection
        self._pool = pool
        encoding = connection.headers.get("content-encoding", "identity").lower()
        # Nothing but plain bytes was asked for; some send gzip all the same.
        zipped = encoding in ("gzip", "deflate")
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32) if zipped else None
        if not zipped and encoding != "identity":
            self.close()
            raise UpstreamError("garbled", f"the answer has an unknown encoding ({encoding})")

    async def read(self, limit: float) -> bytes:
        """The next bytes of the body, as they come; empty at its end.

        Raises:
            UpstreamError: the body broke off, or nothing came for `limit` seconds.
        """
        if self._inflater is None:
            return await self._connection.read(limit)
        while True:
            data = self._inflater.unconsumed_tail or await self._connection.read(limit)
            if not data:
                return b""
            try:
                plain = self._inflater.decompress(data, _LARGEST_INFLATION)
            except zlib.error as error:
                raise UpstreamError("garbled", f"the answer's gzip is broken ({error})") from None
            if plain:
                return plain

    def close(self) -> None:
        """Gives the connection back if the answer is complete, else closes it at once."""
        connection = self._connection
        if connection.reusable:
            connection.idle_since = time.monotonic()
            self._pool.append(connection)
        else:
            connection.abort()


class Upstream:
    """Connections to the backends, pooled by address."""

    def __init__(self, connect_seconds: float = 3):
        self._connect_seconds = connect_seconds
        self._pools: dict[tuple[tuple[str, int, bool], str], list[_Connection]] = {}
        self._tls: dict[str, ssl.SSLContext] = {}  # by certificate

    async def send(
        self,
        method: str,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        limit: float,
        give_up_reason: GiveUpReason | None = None,
        certificate: str = "",
    ) -> Response:
        """Sends a request, and waits up to `limit` seconds for the answer's headers.

        `give_up_reason` is asked every second, here and whenever the answer is waited for. With a
        file of a `certificate`, a TLS server is known by it, and by nothing else.

        Raises:
            UpstreamError: nobody listens, or the connection ended before an answer.
        """
        origin, head = _target(method, url, tuple(headers.items()))
        pool = self._pools.setdefault((origin, certificate), [])
        data = b"%scontent-length: %d\r\n\r\n" % (head, len(body))
        while True:
            connection = self._take(pool) or await self._connect(origin, certificate)
            try:
                connection.request(data, body, give_up_reason)
                await connection.wait_head(limit)
                return Response(connection, pool)
            except UpstreamError as error:
                connection.abort()
                # The backend may have closed a pooled connection just as it was taken up again.
                if not (connection.reused and connection.silent and error.kind == "cut"):
                    raise
                _empty(pool)
            except BaseException:
                connection.abort()
                raise

    def _take(self, pool: list[_Connection]) -> _Connection | None:
        oldest = time.monotonic() - IDLE_SECONDS
        while pool and pool[0].idle_since < oldest:  # the last one back is the first one out
            pool.pop(0).abort()
        while pool:
            connection = pool.pop()
            if connection.usable:
                connection.reused = True
                return connection
        return None

    async def _connect(self, origin: tuple[str, int, bool], certificate: str) -> _Connection:
        host, port, tls = origin
        context = self._context(certificate) if tls else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop), host, port, ssl=context
                )
        except TimeoutError:
            raise UpstreamError("refused", f"no connection to {host}:{port} in time") from None
        except OSError as error:
            reason = error.strerror or error
            raise UpstreamError("refused", f"no connection to {host}:{port} ({reason})") from None
        return connection

    def _context(self, certificate: str) -> ssl.SSLContext:
        context = self._tls.get(certificate)
        if context is None:
            context = ssl.create_default_context(cafile=certificate or None)
            self._tls[certificate] = context
        return context

    def close(self) -> None:
        for pool in self._pools.values():
            _empty(pool)


def _empty(pool: list[_Connection]) -> None:
    while pool:
        pool.pop().abort()
