"""Where a backend is, and how it is asked for something in JSON."""

from __future__ import annotations

from typing import Any

import orjson

from tqstack.router.upstream import Upstream

_LARGEST_ANSWER = 8 << 20  # of what the router asks for itself


class Address:
    """
    Args:
        key: what the backend wants to see of us; a client's own never goes further.
    """

    def __init__(self, url: str, key: str, upstream: Upstream):
        self.url = url
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self._upstream = upstream

    async def fetch(
        self, path: str, body: bytes = b"", seconds: float = 4.0
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a GET, or of a POST if there is a body.

        Raises:
            UpstreamError: there was no answer.
            ValueError: it is no JSON object.
        """
        method = "POST" if body else "GET"
        answer = await self._upstream.send(method, self.url + path, body, self.headers, seconds)
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
