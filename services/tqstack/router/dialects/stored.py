"""Answers that later requests refer to by `previous_response_id`: in memory, the newest."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import orjson

from tqstack.openai_api.errors import bad_request
from tqstack.router.dialects.blocks import items

MOST = 512
MOST_BYTES = 64 << 20


class _Turn(NamedTuple):
    """One answer: what it was asked beyond the turn before, and what it says."""

    items: list[dict[str, Any]]
    size: int
    before: tuple[_Turn, ...]  # oldest first; shared with the other turns


class ResponseStore:
    """The newest answers of the Responses API.

    Args:
        limit: bytes of JSON that are kept.
    """

    def __init__(self, limit: int = MOST_BYTES):
        self._limit = limit
        self._turns: OrderedDict[str, _Turn] = OrderedDict()
        self._size = 0

    def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request with the whole conversation as its input.

        Raises:
            ApiError: 400, if the answer that it refers to is not here (any more).
        """
        name = request.get("previous_response_id")
        if not name:
            return request
        turn = self._turns.get(name) if isinstance(name, str) else None
        if turn is None:
            raise bad_request(
                f"there is no answer {name!r} here: answers are kept in memory for a while, and "
                "with store: false not at all; send the whole input",
                "previous_response_id",
                "previous_response_not_found",
            )
        earlier = [item for one in (*turn.before, turn) for item in one.items]
        rest = {key: value for key, value in request.items() if key != "previous_response_id"}
        return {**rest, "input": [*earlier, *input_items(request)]}

    def keep(self, original: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keeps a whole answer to `original`, unless that said not to."""
        name = answer.get("id")
        if original.get("store") is False or not isinstance(name, str):
            return
        previous = self._turns.get(original.get("previous_response_id") or "")
        said = [item for item in answer.get("output") or () if isinstance(item, dict)]
        new = [*input_items(original), *said]
        size = len(orjson.dumps(new))
        before = (*previous.before, previous) if previous else ()
        self._turns[name] = _Turn(new, size, before)
        self._size += size
        while self._turns and (self._size > self._limit or len(self._turns) > MOST):
            self._size -= self._turns.popitem(last=False)[1].size


def input_items(request: dict[str, Any]) -> list[dict[str, Any]]:
    """A request's input as a list of items.

    Raises:
        ApiError: 400, if it is something else.
    """
    given = request.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}] if given else []
    return items(given, "input")
