"""What the Responses and the Messages API share: an answer is a row of blocks.

A chat completion's message holds reasoning, text and tool calls side by side; both other APIs hold
them as blocks, one after the other, and stream each between an opening and a closing event.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.sse import EventParser
from tqstack.router.tool_calls import CallNumbers

_LARGEST_EVENT = 16 << 20
Kind = Literal["reasoning", "text", "tool"]


@dataclass(slots=True)
class Block:
    """One block; a tool call's text is its arguments.

    Attributes:
        logprobs: chat's, of the text's tokens, where the backend tells them.
    """

    kind: Kind
    call: int = 0  # which of the message's tool calls
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def pieces_of(message: dict[str, Any], numbers: CallNumbers) -> Iterator[tuple[Block, str]]:
    """A message or a delta as pieces: the block that each belongs to, and its text."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning:
        yield Block("reasoning"), reasoning
    content = message.get("content")
    if isinstance(content, str) and content:
        yield Block("text"), content
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        block = Block("tool", numbers.number(call), call.get("id") or "")
        block.name = function.get("name") or ""
        yield block, function.get("arguments") or ""


def blocks_of(answer: dict[str, Any]) -> tuple[list[Block], dict[str, Any]]:
    """The blocks of a whole chat completion, and the choice that they are of."""
    choice = (answer.get("choices") or [{}])[0]
    blocks = []
    for block, text in pieces_of(choice.get("message") or {}, CallNumbers()):
        block.call_id = block.call_id or new_id("call")
        block.pieces.append(text)
        if block.kind == "text":
            block.logprobs += logprobs_of(choice)
        blocks.append(block)
    return blocks, choice


def logprobs_of(choice: dict[str, Any]) -> list[Any]:
    """What a chat's choice tells of its content's tokens."""
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    return content if isinstance(content, list) else []


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class BlockStream(ABC):
    """Reads a chat stream, and has a subclass write each block's events."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.choice: dict[str, Any] = {}  # what the last choices said, but for their deltas
        self.usage: dict[str, Any] = {}
        self.final: dict[str, Any] | None = None  # the whole answer, where it is needed
        self._parser = EventParser(_LARGEST_EVENT)
        self.told: list[Any] = []  # log-probabilities of the piece that has come
        self._open: Block | None = None
        self._numbers = CallNumbers()
        self._begun = False

    @abstractmethod
    def ping(self, text: str) -> bytes: ...

    @abstractmethod
    def fail(self, error: ApiError) -> bytes: ...

    @abstractmethod
    def begin(self, chunk: dict[str, Any]) -> bytes:
        """Events before the first block."""

    @abstractmethod
    def open(self, block: Block) -> bytes: ...

    @abstractmethod
    def delta(self, block: Block, text: str) -> bytes: ...

    @abstractmethod
    def close(self, block: Block) -> bytes: ...

    @abstractmethod
    def finish(self) -> bytes:
        """Events after the last block."""

    def feed(self, data: bytes) -> bytes:
        return b"".join(map(self._take, self._parser.feed(data)))

    def end(self) -> bytes:
        return self._close_open() + self.finish()

    def _take(self, payload: bytes) -> bytes:
        if payload == b"[DONE]":
            return b""
        try:
            chunk = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return b""
        if not isinstance(chunk, dict):
            return b""
        events = b"" if self._begun else self.begin(chunk)
        self._begun = True
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            self.told = logprobs_of(choice)
            for block, text in pieces_of(choice.get("delta") or {}, self._numbers):
                events += self._add(block, text)
            self.choice |= {name: value for name, value in choice.items() if value is not None}
        return events

    def _add(self, block: Block, text: str) -> bytes:
        current, events = self._open, b""
        if current is None or (current.kind, current.call) != (block.kind, block.call):
            events = self._close_open()
            if block.kind == "tool":
                block.call_id = block.call_id or new_id("call")
            current = self._open = block
            self.blocks.append(block)
            events += self.open(block)
        if not text:
            return events
        current.pieces.append(text)
        current.logprobs += self.told if current.kind == "text" else ()
        return events + self.delta(current, text)

    def _close_open(self) -> bytes:
        block, self._open = self._open, None
        return self.close(block) if block else b""


def named_event(data: dict[str, Any]) -> bytes:
    """An event whose name is its data's `type`, as both APIs have it."""
    return b"event: %s\ndata: %s\n\n" % (data["type"].encode(), orjson.dumps(data))


def copied(request: dict[str, Any], *names: str, **renamed: str) -> dict[str, Any]:
    """The fields that keep their meaning; `renamed` is new name = old name."""
    pairs = [*((name, name) for name in names), *renamed.items()]
    return {new: request[old] for new, old in pairs if request.get(old) is not None}


def items(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects.

    Raises:
        ApiError: 400, if it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise bad_request(f"{where} must be a list of objects", where)
    return value


_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high", "ultra": "high"}


def effort(value: Any, where: str) -> str | None:
    """How much is to be thought, in the words that every backend knows.

    Raises:
        ApiError: 400, if it is no word.
    """
    if value is None:
        return None
    word = _EFFORTS.get(value, value) if isinstance(value, str) else None
    if word not in ("none", "low", "medium", "high"):
        known = "none, minimal, low, medium, high, xhigh or max"
        raise bad_request(f"{where} must be {known}", where)
    return word


def text_field(item: dict[str, Any], name: str, where: str) -> str:
    """A string.

    Raises:
        ApiError: 400, if it is missing, or something else.
    """
    value = item.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{where}.{name} must be a string", where)
    return value


def unsupported(what: str, where: str) -> ApiError:
    return bad_request(f"{what} is not supported here", where, "unsupported_value")
