"""Which backend has read which beginnings of conversations: it need not read them again.

A prompt is known by a hash at the end of each of its messages, of all that comes before. The hash
is Python's own, with a seed of this process: nobody can aim at it, and a collision only sends a
prompt where it has to be read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

_PLAIN = {"role", "content"}


class Boundary(NamedTuple):
    """The end of a message.

    Attributes:
        key: hash of the prompt up to here.
        size: the prompt's text up to here, in characters.
    """

    key: int
    size: int


class Read(NamedTuple):
    """Who has read the front of a prompt.

    Attributes:
        tokens: by backend.
        furthest: those that have read most of it.
    """

    tokens: dict[str, int]
    furthest: frozenset[str]


def boundaries(model: str, request: dict[str, Any]) -> list[Boundary]:
    """Those of a chat's prompt, the first one first; none of another request."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return []
    tools = orjson.dumps(request["tools"]) if request.get("tools") else b""
    key, size, found = hash((model, tools)), len(tools), []
    for message in messages:
        text = _text(message)
        key = hash((key, *text))
        size += len(text[-1])
        found.append(Boundary(key, size))
    return found


def _text(message: Any) -> tuple[str | bytes, ...]:
    """What makes a message what it is; of a plain one, without writing it anew."""
    if isinstance(message, dict) and message.keys() == _PLAIN:
        role, content = message["role"], message["content"]
        if isinstance(role, str) and isinstance(content, str):
            return role, content
    return (orjson.dumps(message, option=orjson.OPT_SORT_KEYS),)


class Prefixes:
    """A bounded memory of boundaries; what was not used for longest is forgotten first.

    Args:
        limit: boundaries that are remembered, about 300 bytes each.
    """

    def __init__(self, limit: int = 50_000):
        self._limit = limit
        self._read: OrderedDict[int, dict[str, int]] = OrderedDict()  # tokens by backend

    def __len__(self) -> int:
        return len(self._read)

    def read(self, prompt: Sequence[Boundary]) -> Read:
        """What is remembered of a prompt."""
        found: dict[str, int] = {}
        furthest = frozenset()
        for boundary in reversed(prompt):
            read = self._read.get(boundary.key)
            if read:
                self._read.move_to_end(boundary.key)
                furthest = furthest or frozenset(read)
                found = {**read, **found}
        return Read(found, furthest)

    def remember(self, backend: str, prompt: Sequence[Boundary], tokens: int) -> None:
        """The backend has read this prompt, of so many tokens."""
        new = len(prompt) - 1
        while new and backend not in self._read.get(prompt[new - 1].key, ()):
            new -= 1  # what is known came with all that is before it
        for boundary in prompt[new:]:
            read = self._read.setdefault(boundary.key, {})
            read[backend] = round(tokens * boundary.size / max(1, prompt[-1].size))
            self._read.move_to_end(boundary.key)
        while len(self._read) > self._limit:
            self._read.popitem(last=False)

    def forget(self, backend: str, prompt: Sequence[Boundary]) -> None:
        """The backend has shown that it does not have this prompt's beginnings any more."""
        for boundary in prompt:
            read = self._read.get(boundary.key)
            if read and read.pop(backend, None) is not None and not read:
                del self._read[boundary.key]
