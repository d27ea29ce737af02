"""The load: requests against a target, and what they cost it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
import time

import orjson

from tqstack.bench.router.targets import Target

SMALL, LARGE = 500, 500_000  # bytes of a request
_SENT_AT = re.compile(rb'"content": ?"(\d+\.\d+) ')
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_PATH = "/v1/chat/completions"


def request_bytes(size: int, order: str = "", stream: bool = False) -> bytes:
    """A chat request whose body has about `size` bytes; `order` tells the backend what to do."""
    content = f"#{order}# " if order else ""
    content += ("hello you " * (size // 10))[: max(1, size - 90 - len(content))]
    messages = [{"role": "user", "content": content}]
    body = orjson.dumps({"model": "bench", "messages": messages, "stream": stream})
    head = f"POST {_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One client connection; `ask` sends a request and waits for the whole answer.

    Attributes:
        first: when the first event of the last answer came.
        delays: seconds from the backend's sending of a chunk to its arrival here.
    """

    def __init__(self) -> None:
        self.first = 0.0
        self.delays: list[float] = []
        self._data = bytearray()
        self._streaming = False
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # pyright: ignore[reportAttributeAccessIssue]

    async def ask(self, request: bytes, stream: bool = False) -> None:
        self._data.clear()
        self._streaming, self.first = stream, 0.0
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._answer

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._streaming:
            for sent_at in _SENT_AT.findall(data):
                self.first = self.first or now
                self.delays.append(now - float(sent_at))
        self._data += data
        if self._answer and not self._answer.done() and self._whole():
            if not self._data.startswith(b"HTTP/1.1 200"):
                self._answer.set_exception(RuntimeError(self._data[:300].decode()))
            else:
                self._answer.set_result(None)

    def _whole(self) -> bool:
        if self._streaming:
            if len(self._data) > 4096:  # only the end matters
                del self._data[64:-64]
            return self._data.endswith(b"0\r\n\r\n")
        head_end = self._data.find(b"\r\n\r\n")
        if head_end < 0:
            return False
        length = _LENGTH.search(self._data, 0, head_end)
        if length is None:
            return self._data.endswith(b"0\r\n\r\n")
        return len(self._data) >= head_end + 4 + int(length[1])

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(ConnectionError("the proxy closed the connection"))


async def connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(Connection, "127.0.0.1", port))[1]


async def throughput(
    target: Target, size: int, connections: int, seconds: float, order: str = "", kind: str = ""
) -> None:
    """Requests per second of `connections` clients without a pause, and processor time of each.

    Args:
        order: what the backend is told to do.
        kind: what the figures are called, if not by the size.
    """
    request, done = request_bytes(size, order), 0
    clients = [await connect(target.port) for _ in range(connections)]
    end = time.perf_counter() + seconds

    async def run(client: Connection) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await client.ask(request)
            done += 1

    began, cpu = time.perf_counter(), target.cpu_seconds()
    await asyncio.gather(*map(run, clients))
    elapsed = time.perf_counter() - began
    for client in clients:
        client.transport.close()
    kind = kind or ("small" if size == SMALL else "large")
    target.note(**{f"rps_{kind}": done / elapsed})
    if cpu:
        target.note(**{f"cpu_us_{kind}": 1e6 * (target.cpu_seconds() - cpu) / done})


async def first_token(target: Target, size: int, count: int) -> None:
    """Milliseconds from sending a request to its first chunk, at one connection."""
    request, client = request_bytes(size, "1x0", stream=True), await connect(target.port)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await client.ask(request, stream=True)
        times.append(1e3 * (client.first - began))
    client.transport.close()
    target.note(**{f"ttft_{'small' if size == SMALL else 'large'}": statistics.median(times)})


async def streams(target: Target, count: int, seconds: float) -> None:
    """Delay of chunks, with `count` streams of 100 chunks a second, and processor time of each."""
    request = request_bytes(SMALL, f"{round(100 * seconds)}x0.01", stream=True)
    clients = [await connect(target.port) for _ in range(count)]
    cpu = target.cpu_seconds()

    async def run(client: Connection, place: int) -> None:
        await asyncio.sleep(0.01 * place / count)
        await client.ask(request, stream=True)

    await asyncio.gather(*(run(client, place) for place, client in enumerate(clients)))
    delays = sorted(1e3 * delay for client in clients for delay in client.delays)
    for client in clients:
        client.transport.close()
    target.note(gap_p50=delays[len(delays) // 2], gap_p99=delays[int(len(delays) * 0.99)])
    if cpu:
        target.note(cpu_us_chunk=1e6 * (target.cpu_seconds() - cpu) / len(delays))


async def cancels(target: Target, backend_port: int, count: int) -> None:
    """Milliseconds until the backend sees that a client left: before a byte, and in a stream."""
    for name, order, stream in (("wait", "hang", False), ("stream", "1000x0.01", True)):
        delays = []
        for _ in range(count):
            client = await connect(target.port)
            asking = asyncio.ensure_future(client.ask(request_bytes(SMALL, order, stream), stream))
            await asyncio.sleep(0.05)
            before = len(await _closed(backend_port))
            left = time.perf_counter()
            client.transport.abort()
            with contextlib.suppress(ConnectionError):
                await asking
            closed: list[float] = []
            while len(closed) <= before and time.perf_counter() - left < 2:
                await asyncio.sleep(0.005)
                closed = await _closed(backend_port)
            delays.append(1e3 * (closed[-1] - left) if len(closed) > before else float("inf"))
        target.note(**{f"cancel_{name}": max(delays)})


async def _closed(port: int) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /closed HTTP/1.1\r\nhost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = _LENGTH.search(head)
    body = await reader.readexactly(int(length[1] if length else 0))
    writer.close()
    return orjson.loads(body)
