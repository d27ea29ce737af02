"""A request's body, as long as it is not too long. On bare ASGI, for both services."""

from __future__ import annotations

from typing import Any

from tqstack.openai_api.errors import ApiError


class ClientGone(Exception):
    """The client closed its connection before the whole request was here."""


async def read_body(receive: Any, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, as soon as it is larger than `limit` bytes.
        ClientGone: the client closed its connection.
    """
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise too_large(limit)
        more = message.get("more_body")
    return b"".join(pieces)


def too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit >> 20} MB; send less, or raise ROUTER_BODY_LIMIT_MB",
        code="request_too_large",
        retry=False,
    )
