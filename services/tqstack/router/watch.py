"""A side look at an answer that passes through: is it whole, and what does it say of itself?"""

from __future__ import annotations

from typing import Any

import orjson

from tqstack.openai_api.sse import EventParser

# An event that is larger passes on in pieces, as it comes; smaller ones pass whole or not at all,
# so that a client never sees half an event before an error event.
_LARGEST_HELD = 1 << 20
# The last events of the Responses and the Messages API, which send no `[DONE]`.
_LAST = ("response.completed", "response.incomplete", "message_stop")


class StreamWatch:
    """Looks at a stream of chat or text completion chunks.

    Attributes:
        started: an event with data has come.
        finished: a choice has given its finish reason.
        done: `[DONE]` has come.
        events: events with data so far, about one per token.
        error: the payload of an error event.
        usage: the `usage` object, if one came.
        answer: the whole answer, from a stream of the Responses API.
    """

    def __init__(self) -> None:
        self.started = self.finished = self.done = False
        self.events = 0
        self.error: Any = None
        self.usage: dict[str, Any] | None = None
        self.answer: dict[str, Any] | None = None
        self._parser = EventParser(_LARGEST_HELD)
        self._held = bytearray()
        self._unseen = False  # an event was too large to be looked at

    @property
    def comment(self) -> str:
        return self._parser.comment

    @property
    def whole(self) -> bool:
        """Nothing is missing: without a finish reason, a client takes a piece for the whole."""
        if self.error is not None:
            return False
        return self.finished or (self.done and self._unseen)

    def feed(self, chunk: bytes) -> bytes:
        """Takes bytes of the stream; gives back what may go to the client."""
        if self.error is not None:
            return b""
        for payload in self._parser.feed(chunk):
            self._look(payload)
        ready = self._whole_events(chunk)
        # An error event of our own takes the place of these: no client reads on after `[DONE]`.
        if self.error is not None:
            return _before(ready, b'"error"')
        if self.done and not self.whole:
            return _before(ready, b"[DONE]")
        return ready

    def _whole_events(self, chunk: bytes) -> bytes:
        pending = self._parser.pending
        if not pending and not self._held:
            return chunk
        self._held += chunk
        if pending > _LARGEST_HELD:
            self.started = self._unseen = True
            pending = 0
        cut = len(self._held) - pending
        ready = bytes(self._held[:cut])
        del self._held[:cut]
        return ready

    def _look(self, payload: bytes) -> None:
        self.started = True
        self.events += 1
        if payload == b"[DONE]":
            self.done = True
            return
        # Most chunks hold only a piece of text: parse the others.
        if b'"finish_reason":null' in payload and not (b'"usage"' in payload or b'"err' in payload):
            return
        try:
            value = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return
        if not isinstance(value, dict):
            return
        if value.get("error"):
            self.error = value["error"]
        if isinstance(value.get("usage"), dict):
            self.usage = {**(self.usage or {}), **value["usage"]}
        for choice in value.get("choices") or ():
            if isinstance(choice, dict) and choice.get("finish_reason"):
                self.finished = True
        if isinstance(value.get("type"), str):
            self._look_at_typed(value["type"], value)

    def _look_at_typed(self, kind: str, value: dict[str, Any]) -> None:
        """Events of the Responses and the Messages API, from a backend that speaks them itself."""
        inner = value.get("response") or value.get("message")
        if isinstance(inner, dict):
            if isinstance(inner.get("usage"), dict):
                self.usage = {**(self.usage or {}), **inner["usage"]}
            if inner.get("error"):
                self.error = inner["error"]
        if kind == "error" and self.error is None:
            self.error = value
        if kind in _LAST:
            self.finished = self.done = True
            self.answer = value.get("response")


def _before(events: bytes, mark: bytes) -> bytes:
    """The events that come before the last one with this mark."""
    return events[: max(0, events.rfind(b"data:", 0, events.rfind(mark) + 1))]
