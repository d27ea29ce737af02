"""Server-sent events: writing them, and reading them from bytes that arrive in any pieces."""

from __future__ import annotations

import re
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
# Only these end a line in SSE; str.splitlines would also split on U+2028 inside JSON.
_LINE_END = re.compile(rb"\r\n|\n|\r")


def event(data: Any) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventParser:
    """Collects bytes and gives back the `data` payloads of whole events.

    An event that grows over `limit` bytes is dropped (its payload is not returned), so that a
    watcher beside a stream holds a bounded amount whatever the stream sends.
    """

    def __init__(self, limit: int = 1 << 20):
        self._limit = limit
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0
        self._skipping = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads of the events that `chunk` completes."""
        text = self._rest + chunk
        # A final \r may be half of \r\n: wait for what follows.
        held = text[-1:] == b"\r"
        lines = _LINE_END.split(text[:-1] if held else text)
        self._rest = lines.pop() + (b"\r" if held else b"")
        if len(self._rest) > self._limit:
            self._rest, self._skipping = b"", True
        payloads = []
        for line in lines:
            if self._skipping:
                # The rest of a line that was too long; the event goes with it.
                self._skipping, self._data, self._size = False, [], self._limit + 1
            elif line:
                self._take(line)
            else:
                if self._data and self._size <= self._limit:
                    payloads.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        return payloads

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data" and self._size <= self._limit:
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
