"""A last assistant message, which an answer goes on with. Ollama may repeat it before that."""

from __future__ import annotations

from typing import Any

import orjson


def begun_by(request: dict[str, Any]) -> str:
    """What the client has begun to say for the model; empty: nothing."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    content = last.get("content")
    return content if isinstance(content, str) else ""


class Unrepeated:
    """Takes what was begun away from the front of a chat's answer.

    A model that has a template of Ollama's own does not repeat it, nor does its first token hold
    it, unless what was begun is a letter or two.
    """

    def __init__(self, begun: str):
        self._begun = begun
        self._over = False

    def feed(self, events: bytes) -> bytes:
        """Whole events of a stream, without it."""
        if self._over or b'"content"' not in events:
            return events
        return b"".join(map(self._line, events.splitlines(keepends=True)))

    def whole(self, answer: dict[str, Any]) -> None:
        self._shorten(answer, "message")

    def _line(self, line: bytes) -> bytes:
        if self._over or not line.startswith(b"data: {"):
            return line
        try:
            chunk = orjson.loads(line[5:])
            self._shorten(chunk, "delta")
        except (ValueError, AttributeError, TypeError):  # no chunk of a chat: not ours to judge
            return line
        end = line[len(line.rstrip(b"\r\n")) :]
        return b"data: " + orjson.dumps(chunk) + end

    def _shorten(self, answer: dict[str, Any], where: str) -> None:
        for choice in answer.get("choices") or ():
            said = choice.get(where) or {}
            if content := said.get("content"):
                self._over = True
                said["content"] = content.removeprefix(self._begun)
