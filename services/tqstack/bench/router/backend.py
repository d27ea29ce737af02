"""A backend that costs next to nothing, for `tqstack bench router`: what is measured is the proxy.

`python -m tqstack.bench.router.backend` prints its port. What the prompt begins with says what to
do: `#100x0.01#` streams 100 chunks, 0.01 s apart, each with the time at which it was sent; `#hang#`
never answers; `#after0.05#` is answered after 0.05 s; anything else is answered at once. `GET
/closed` tells when requests were given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import ClassVar

import orjson
import uvloop

_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ORDER = re.compile(rb'"content": ?"#([^#]+)#')
_USAGE = {"prompt_tokens": 120, "completion_tokens": 12, "total_tokens": 132}
_ANSWER = orjson.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * 40},
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    }
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def _json(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event() -> bytes:
    text = f"{time.perf_counter():.6f} word"
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "model": "bench", "choices": [choice]}
    return _chunk(b"data: " + orjson.dumps(chunk) + b"\n\n")


class _Connection(asyncio.Protocol):
    closed: ClassVar[list[float]] = []  # when a request was given up

    def __init__(self) -> None:
        self._data = bytearray()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # pyright: ignore[reportAttributeAccessIssue]

    def data_received(self, data: bytes) -> None:
        self._data += data
        head_end = self._data.find(_HEAD_END)
        if head_end < 0:
            return
        length = _LENGTH.search(self._data, 0, head_end)
        end = head_end + len(_HEAD_END) + int(length[1] if length else 0)
        if len(self._data) < end:
            return
        request = bytes(self._data[:end])
        del self._data[:end]
        self._answer(request, head_end)

    def _answer(self, request: bytes, head_end: int) -> None:
        if request.startswith(b"GET /closed"):
            self._transport.write(_json(orjson.dumps(self.closed)))
        elif request.startswith(b"GET "):
            self._transport.write(_json(b'{"data": [{"id": "bench", "object": "model"}]}'))
        else:
            order = _ORDER.search(request, head_end)
            self._do(order[1].decode() if order else "")

    def _do(self, what: str) -> None:
        if what == "hang":
            self._task = asyncio.ensure_future(asyncio.sleep(60))
        elif what.startswith("after"):
            self._task = asyncio.ensure_future(self._late(float(what.removeprefix("after"))))
        elif what:
            count, _, interval = what.partition("x")
            self._task = asyncio.ensure_future(self._stream(int(count), float(interval)))
        else:
            self._transport.write(_json(_ANSWER))

    async def _late(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._transport.write(_json(_ANSWER))

    async def _stream(self, count: int, interval: float) -> None:
        self._transport.write(_STREAM_HEAD + _event())
        due = time.perf_counter()
        for _ in range(count - 1):
            due += interval
            await asyncio.sleep(due - time.perf_counter())
            self._transport.write(_event())
        self._transport.write(_chunk(_LAST) + b"0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task and not self._task.done():
            self.closed.append(time.perf_counter())
            self._task.cancel()


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve())
