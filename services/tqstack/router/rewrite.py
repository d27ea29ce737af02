"""The one change that a body undergoes on its way: the model's name."""

from __future__ import annotations

import re
from typing import Any

import orjson

_KEY = b'"model"'
_VALUE = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')


def with_model(body: bytes, request: dict[str, Any], model: str) -> bytes:
    """`body` with its model's name replaced, every other byte as it was.

    Args:
        body: JSON text of an object.
        request: the same, parsed.
        model: the new name.

    A body in which the key cannot be told from another one of that name is written anew: the
    values stay the same, the spacing may not.
    """
    old = request.get("model")
    if old == model:
        return body
    places = body.count(_KEY)
    if old is None and not places:
        start = body.index(b"{") + 1
        comma = b"," if request else b""
        return b"%s%s:%s%s%s" % (body[:start], _KEY, orjson.dumps(model), comma, body[start:])
    if places == 1:
        match = _VALUE.match(body, body.index(_KEY))
        if match and orjson.loads(match[1]) == old:
            return body[: match.start(1)] + orjson.dumps(model) + body[match.end(1) :]
    return orjson.dumps({**request, "model": model})
