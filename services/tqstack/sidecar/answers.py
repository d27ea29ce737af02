"""Answers in OpenAI's form, whole or in chunks, for chat and for plain completions."""

from __future__ import annotations

import time
import uuid
from dataclasses import astuple, dataclass, field
from typing import Any

from tqstack.sidecar.logprobs import Spoken, chat_form, text_form
from tqstack.sidecar.text import Content, Part, Reasoning, ToolCall


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass
class Choice:
    """One of an answer's choices, as far as it has come.

    Attributes:
        stop_reason: the stop string or the stop token that ended it.
        stats: how it was made.
        prompt_logprobs: vLLM's, of its prompt.
    """

    index: int = 0
    parts: list[Part] = field(default_factory=list)
    calls: int = 0
    reason: str | None = None
    stop_reason: str | int | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    prompt_logprobs: list[Any] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Content))


@dataclass
class Answer:
    """Answers in the making: turns parts into chunks, and collected parts into the whole.

    Args:
        legacy: tool calls have the form of before tools.
        logprobs: those of the tokens are told.
    """

    model: str
    chat: bool
    legacy: bool = False
    logprobs: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = self.id or f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk of a choice of a chat stream."""
        return self._chunk(choice, {"role": "assistant", "content": ""}) if self.chat else None

    def chunk(self, choice: Choice, part: Part) -> dict[str, Any]:
        """A part as a stream chunk."""
        if not self.chat:
            text = part.text if isinstance(part, Content) else ""
            return self._chunk(choice, text, _tokens(part))
        if isinstance(part, ToolCall):
            number, choice.calls = choice.calls, choice.calls + 1
            if self.legacy:
                return self._chunk(choice, {"function_call": _tool_call(part)["function"]})
            return self._chunk(choice, {"tool_calls": [{"index": number, **_tool_call(part)}]})
        if isinstance(part, Reasoning):
            return self._chunk(choice, _reasoning(part.text))
        return self._chunk(choice, {"content": part.text}, _tokens(part))

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The last chunk of a choice."""
        chunk = self._chunk(choice, {} if self.chat else "")
        chunk["choices"][0] |= self._ending(choice)
        return {**chunk, **_made(choice)}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._envelope("chunk"), "choices": [], "usage": usage.as_dict()}

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """The collected parts as one answer."""
        told = choices[0].prompt_logprobs
        return {
            **self._envelope(""),
            "choices": [self._whole(choice) for choice in choices],
            "usage": usage.as_dict(),
            **_made(choices[0]),
            **({"prompt_logprobs": told} if self.chat and told is not None else {}),
        }

    def _whole(self, choice: Choice) -> dict[str, Any]:
        tokens = [token for part in choice.parts for token in _tokens(part)]
        made: dict[str, Any] = {
            "index": choice.index,
            "logprobs": self._told(tokens),
            **self._ending(choice),
        }
        if self.chat:
            return {**made, "message": self._message(choice)}
        if choice.prompt_logprobs is not None:
            made["prompt_logprobs"] = choice.prompt_logprobs
        return {**made, "text": choice.text}

    def _told(self, tokens: list[Spoken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return chat_form(tokens) if self.chat else text_form(tokens)

    def _ending(self, choice: Choice) -> dict[str, Any]:
        """Why it ended; `stop_reason` is vLLM's."""
        reason = choice.reason or "stop"
        if self.legacy and reason == "tool_calls":
            reason = "function_call"
        found = {} if choice.stop_reason is None else {"stop_reason": choice.stop_reason}
        return {"finish_reason": reason, **found}

    def _message(self, choice: Choice) -> dict[str, Any]:
        parts, text = choice.parts, choice.text
        calls = [_tool_call(part) for part in parts if isinstance(part, ToolCall)]
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if reasoning:
            message |= _reasoning(reasoning)
        if calls and self.legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return message

    def _chunk(
        self, choice: Choice, delta: Any, tokens: list[Spoken] | None = None
    ) -> dict[str, Any]:
        name, told = "delta" if self.chat else "text", self._told(tokens) if tokens else None
        made = {"index": choice.index, name: delta, "finish_reason": None, "logprobs": told}
        return {**self._envelope("chunk"), "choices": [made]}

    def _envelope(self, suffix: str) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        kind = f"{kind}.{suffix}" if suffix and self.chat else kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _made(choice: Choice) -> dict[str, Any]:
    """How a choice was made; of its drafts as llama.cpp tells it, where there were any."""
    names = ("draft_n", "draft_n_accepted")
    stats = {name: value for name, value in choice.stats.items() if name not in names}
    drafts = {name: choice.stats[name] for name in names if choice.stats.get("draft_n")}
    return {"tqstack": stats, **({"timings": drafts} if drafts else {})}


def _tokens(part: Part) -> list[Spoken]:
    return part.tokens if isinstance(part, Content) else []


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients read: DeepSeek's, and OpenRouter's and Ollama's."""
    return {"reasoning_content": text, "reasoning": text}


def _tool_call(part: ToolCall) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": part.id, "type": "function", "function": function}
