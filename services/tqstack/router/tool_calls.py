"""Which tool call a piece of a stream belongs to, whatever the backend says of its index.

Some backends stream parallel calls that all have the index 0, or none. An id that changes begins a
call; so does a name, where there are no ids and the call before has its arguments already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Call:
    number: int
    id: str
    named: bool
    filled: bool  # it has arguments


class CallNumbers:
    """Numbers the tool calls of one message's stream."""

    def __init__(self) -> None:
        self._by_index: dict[Any, _Call] = {}
        self._last: _Call | None = None
        self._count = 0

    def number(self, call: dict[str, Any]) -> int:
        """The number, from 0, of the call that this delta belongs to."""
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        index, call_id, name = call.get("index"), call.get("id") or "", function.get("name") or ""
        current = self._last if index is None else self._by_index.get(index)
        if current is None or _begins(current, call_id, name):
            current = _Call(self._count, call_id, False, False)
            self._count += 1
        current.id = current.id or call_id
        current.named = current.named or bool(name)
        current.filled = current.filled or bool(function.get("arguments"))
        self._by_index[index] = self._last = current
        return current.number


def _begins(current: _Call, call_id: str, name: str) -> bool:
    if call_id and current.id:
        return call_id != current.id
    return bool(name) and current.named and current.filled
