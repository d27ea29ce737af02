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


def comment(text: str) -> bytes:
    """A comment: clients ignore it, and it keeps an idle connection open."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"


class EventParser:
    """Collects bytes and gives back the `data` payloads of whole events.

    An event that grows over `limit` bytes is dropped (its payload is not returned), so that a
    watcher beside a stream holds a bounded amount whatever the stream sends. Every byte is looked
    at once, however small the pieces are.

    Attributes:
        pending: bytes fed since the end of the last whole event; 0 between events.
        comment: text of the last comment.
    """

    def __init__(self, limit: int = 1 << 20):
        self.pending = 0
        self.comment = ""
        self._limit = limit
        self._line: list[bytes] = []  # pieces of the line that has not ended
        self._line_size = 0
        self._data: list[bytes] = []  # data lines of the event that has not ended
        self._size = 0
        self._after_return = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads of the events that `chunk` completes."""
        if not self.pending and self._is_one_event(chunk):
            self._after_return = False
            return [chunk[6:-2]]
        # A \r ends its line at once; the \n of a \r\n that was cut in two ends nothing.
        if self._after_return and chunk[:1] == b"\n":
            chunk = chunk[1:]
            self.pending += self.pending > 0
            self._after_return = False
        if not chunk:
            return []
        self._after_return = chunk[-1:] == b"\r"
        payloads: list[bytes] = []
        start = 0
        for line_end in _LINE_END.finditer(chunk):
            self._hold(chunk[start : line_end.start()])
            start = line_end.end()
            if self._line_size:
                self._end_line()
            else:
                self._end_event(payloads)
                self.pending = -start
        self._hold(chunk[start:])
        self.pending += len(chunk)
        return payloads

    def _is_one_event(self, chunk: bytes) -> bool:
        """Whether this is one event of one line of data, as most chunks are."""
        return (
            chunk.startswith(b"data: ")
            and chunk.endswith(b"\n\n")
            and chunk.find(b"\n") == len(chunk) - 2 <= self._limit
            and b"\r" not in chunk
        )

    def _hold(self, piece: bytes) -> None:
        if piece:
            self._line.append(piece)
            self._line_size += len(piece)
            self._size += len(piece)
            if self._size > self._limit:
                self._line.clear()
                self._data.clear()

    def _end_line(self) -> None:
        name, _, value = b"".join(self._line).partition(b":")
        if name == b"data" and self._size <= self._limit:
            self._data.append(value.removeprefix(b" "))
        elif not name and value:
            self.comment = value.decode(errors="replace").strip()
        self._line.clear()
        self._line_size = 0

    def _end_event(self, payloads: list[bytes]) -> None:
        if self._data and self._size <= self._limit:
            payloads.append(b"\n".join(self._data))
        self._data.clear()
        self._size = 0
