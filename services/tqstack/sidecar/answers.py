"""Answers in OpenAI's form, whole or in chunks, for chat and for plain completions."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from tqstack.sidecar.text import Content, Part, Reasoning, ToolCall


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Answer:
    """One answer in the making: turns parts into chunks, and collects them for the whole."""

    model: str
    chat: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    parts: list[Part] = field(default_factory=list)
    _calls: int = 0

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a chat stream."""
        return self._chunk({"role": "assistant", "content": ""}) if self.chat else None

    def chunk(self, part: Part) -> dict[str, Any]:
        """A part as a stream chunk."""
        if not self.chat:
            return self._chunk(part.text if isinstance(part, Content) else "")
        if isinstance(part, ToolCall):
            call = {"index": self._calls, **_tool_call(part)}
            self._calls += 1
            return self._chunk({"tool_calls": [call]})
        name = "reasoning_content" if isinstance(part, Reasoning) else "content"
        return self._chunk({name: part.text})

    def closing(self, reason: str, extra: dict[str, Any]) -> dict[str, Any]:
        """The last chunk with a choice."""
        return {**self._chunk({} if self.chat else "", reason), "tqstack": extra}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._envelope("chunk"), "choices": [], "usage": usage.as_dict()}

    def whole(self, reason: str, usage: Usage, extra: dict[str, Any]) -> dict[str, Any]:
        """The collected parts as one answer."""
        text = "".join(part.text for part in self.parts if isinstance(part, Content))
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.chat:
            choice["message"] = self._message(text)
        else:
            choice["text"] = text
        return {
            **self._envelope(""),
            "choices": [choice],
            "usage": usage.as_dict(),
            "tqstack": extra,
        }

    def _message(self, text: str) -> dict[str, Any]:
        calls = [_tool_call(part) for part in self.parts if isinstance(part, ToolCall)]
        reasoning = "".join(part.text for part in self.parts if isinstance(part, Reasoning))
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _chunk(self, delta: Any, reason: str | None = None) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        choice = {"index": 0, name: delta, "finish_reason": reason, "logprobs": None}
        return {**self._envelope("chunk"), "choices": [choice]}

    def _envelope(self, suffix: str) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        kind = f"{kind}.{suffix}" if suffix and self.chat else kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _tool_call(part: ToolCall) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": part.id, "type": "function", "function": function}
