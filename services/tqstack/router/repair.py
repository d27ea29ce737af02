"""Answers to chats as every client reads them, whichever backend gave them.

Reasoning has two names in the field, and a backend uses one; indexes of tool calls may be wrong.
"""

from __future__ import annotations

from typing import Any

import orjson

from tqstack.router.tool_calls import CallNumbers

_NAMES = ("reasoning", "reasoning_content")


class ChatRepair:
    """Repairs a chat's stream. What is right passes byte by byte."""

    def __init__(self) -> None:
        self._choices: dict[Any, CallNumbers] = {}

    def feed(self, events: bytes) -> bytes:
        """Whole events of a chat stream, as the client is to see them."""
        if not _may_need_it(events):
            return events
        return b"".join(map(self._line, events.splitlines(keepends=True)))

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:") or not _may_need_it(line):
            return line
        try:
            chunk = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            return line
        if not isinstance(chunk, dict) or not self._repaired(chunk):
            return line
        end = line[len(line.rstrip(b"\r\n")) :]
        return b"data: " + orjson.dumps(chunk) + end

    def _repaired(self, chunk: dict[str, Any]) -> bool:
        """Whether something had to be changed."""
        changed = False
        for choice in _objects(chunk.get("choices")):
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                continue
            numbers = self._choices.setdefault(choice.get("index"), CallNumbers())
            for call in _objects(delta.get("tool_calls")):
                number = numbers.number(call)
                changed = changed or call.get("index") != number
                call["index"] = number
            changed = _both_names(delta) or changed
        return changed


def repair_whole(answer: dict[str, Any]) -> bool:
    """Repairs an answer in one piece; whether something had to be changed."""
    messages = [choice.get("message") for choice in _objects(answer.get("choices"))]
    # All of them: `any` would stop at the first that was changed.
    return sum(_both_names(message) for message in messages if isinstance(message, dict)) > 0


def _may_need_it(data: bytes) -> bool:
    return b'"tool_calls"' in data or b'"reasoning' in data


def _both_names(message: dict[str, Any]) -> bool:
    """Reasoning under both names; whether one was missing."""
    for name, other in (_NAMES, _NAMES[::-1]):
        if message.get(name) and not message.get(other):
            message[other] = message[name]
            return True
    return False


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
