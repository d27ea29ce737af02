"""Where a backend is, and how something is sent to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from tqstack.router.upstream import GiveUpReason, Response, Upstream

_LARGEST_ANSWER = 8 << 20  # of what the router asks for itself


class Address:
    """
    Args:
        key: what the backend wants to see of us; a client's own never goes further.
        certificate: file of the one that a TLS server must show; empty: of a known authority.
    """

    def __init__(self, url: str, key: str, certificate: str, upstream: Upstream):
        self.url = url
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._certificate = certificate
        self._upstream = upstream

    async def send(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        limit: float,
        give_up_reason: GiveUpReason | None = None,
    ) -> Response:
        """See `Upstream.send`.

        Raises:
            UpstreamError: there was no answer.
        """
        return await self._upstream.send(
            method,
            self.url + path,
            body,
            {**headers, **self._headers},
            limit,
            give_up_reason,
            self._certificate,
        )

    async def fetch(
        self, path: str, body: bytes = b"", seconds: float = 4.0
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a GET, or of a POST if there is a body.

        Raises:
            UpstreamError: there was no answer.
            ValueError: it is no JSON object.
        """
        answer = await self.send("POST" if body else "GET", path, body, {}, seconds)
        try:
            data = bytearray()
            while chunk := await answer.read(seconds):
                data += chunk
                if len(data) > _LARGEST_ANSWER:
                    raise ValueError(f"{path} answers more than {_LARGEST_ANSWER} bytes")
        finally:
            answer.close()
        value = orjson.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"{path} answers no JSON object")
        return answer.status, value
