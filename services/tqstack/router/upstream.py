"""The one seam to the backends: send a request, read the answer as bytes.

The rest of the router knows `Upstream` and `Answer` only, so that tests may put anything else here.
"""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp


class UpstreamError(Exception):
    """The backend did not take the request, or its answer broke off.

    Attributes:
        kind: `refused` (no connection), or `cut` (the connection ended too early).
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Answer:
    """A backend's answer: status and headers are there, the body is read piece by piece."""

    def __init__(self, response: aiohttp.ClientResponse):
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response

    async def read(self) -> bytes:
        """The next bytes of the body, as they come; empty at its end.

        Raises:
            UpstreamError: the body broke off.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("cut", f"the answer broke off ({error})") from None

    def close(self) -> None:
        """Gives the connection back if the body was read to its end, else closes it at once."""
        self._response.close()


class Upstream:
    """A pool of connections to the backends."""

    def __init__(self, connect_seconds: float = 3):
        # No limit on the answer's headers: a backend that does not stream sends them when it is
        # done. What is read ahead is bounded, so that a slow client slows the backend down.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            skip_auto_headers=("user-agent",),
            read_bufsize=1 << 16,
        )

    async def send(
        self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Sends a request and waits for the answer's headers.

        Raises:
            UpstreamError: nobody listens, or the connection ended before an answer.
        """
        for retry in (False, True):
            try:
                return Answer(
                    await self._session.request(
                        method, url, data=body or None, headers=headers, allow_redirects=False
                    )
                )
            except aiohttp.ServerDisconnectedError as error:
                # A pooled connection may have been closed as it was taken up: try a fresh one.
                if retry:
                    raise UpstreamError("cut", f"the connection was closed ({error})") from None
            except (TimeoutError, aiohttp.ClientConnectorError) as error:
                raise UpstreamError("refused", f"no connection ({error})") from None
            except (aiohttp.ClientError, OSError) as error:
                raise UpstreamError("cut", f"the connection broke ({error})") from None
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._session.close()
