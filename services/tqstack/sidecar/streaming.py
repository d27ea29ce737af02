"""Responses that end as soon as the client is gone, also before the first token.

Starlette notices a client that has left only when a send fails; these watch `receive` meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tqstack.openai_api import sse
from tqstack.openai_api.errors import ApiError


class WhileConnected(Response):
    """A JSON answer that takes long; its making is cancelled when the client goes away."""

    def __init__(self, make: Callable[[], Awaitable[dict[str, Any]]]):
        self._make = make
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer() -> None:
            try:
                response = JSONResponse(await self._make())
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, receive, send)

        await _until_gone(receive, answer())


class EventStream(Response):
    """Server-sent events: headers with the first of what `make` yields.

    An ApiError that `make` raises before has its own status; one that it raises later becomes an
    error event, and the stream ends without [DONE].
    """

    def __init__(self, make: Callable[[], AsyncIterator[bytes]]):
        self._make = make
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]

        async def stream() -> None:
            async with aclosing(self._make()) as events:  # pyright: ignore
                try:
                    first = await anext(events, b"")
                except ApiError as error:
                    response = JSONResponse(error.body, error.status, error.headers)
                    return await response(scope, receive, send)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": first, "more_body": True})
                async for data in _with_errors(events):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await _until_gone(receive, stream())


async def _with_errors(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for data in events:
            yield data
    except ApiError as error:
        yield sse.event(error.body)


async def _until_gone(receive: Receive, work: Any) -> None:
    """Run `work` until it ends or the client disconnects, whichever is first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
