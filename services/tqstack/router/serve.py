"""Serving the router with uvicorn."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tqstack.router.app import create_app
from tqstack.settings import Settings

# Well above the idle time of clients' pools: a connection that is closed just as a client takes it
# up again is a request that fails.
KEEP_ALIVE_SECONDS = 120
DRAIN_SECONDS = 30


def server(settings: Settings) -> uvicorn.Server:
    """A server for the router, ready to run."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.router_host,
        port=settings.router_port,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        # Who the client is decides nothing here, least of all by its own word.
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return uvicorn.Server(config)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, with an answer's head and the beginning of its body in one write."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast(asyncio.Transport, _HeadHolder(transport, self.loop)))


class _HeadHolder:
    """A transport that keeps an answer's head back until its body comes, or the loop goes round.

    A write is a system call, and the dearest part of a small answer.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport = transport
        self._loop = loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)
