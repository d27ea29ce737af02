"""Who may talk to a service: checks of Host, Origin and key, before anything else is looked at.

A web page that the user visits can send requests to 127.0.0.1, with its own Origin, or under a name
of its own that it lets point here (DNS rebinding). Neither gets an answer.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tqstack.openai_api.errors import ApiError

_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"*, authorization"),
    (b"access-control-max-age", b"600"),
]


CLIENT = "tqstack.client"
# The name of the client that sends this key, empty if that does not matter; `None` for a stranger.
NameOf = Callable[[bytes | None], str | None]


def _with_one_key(wanted: bytes, key: bytes | None) -> str | None:
    known = not wanted or (key is not None and hmac.compare_digest(key, wanted))
    return "" if known else None


class Guard:
    """The checks of one service.

    Args:
        hosts: names under which it may be reached, and from whose pages.
        key: what clients must send, empty: nothing; or what tells who a key belongs to.
        open_paths: need no key.
    """

    def __init__(self, hosts: Iterable[str], key: str | NameOf, open_paths: tuple[str, ...] = ()):
        self._names = {host.strip().lower() for host in hosts} - {""}
        self._name_of = partial(_with_one_key, key.encode()) if isinstance(key, str) else key
        self._open_paths = open_paths

    def check(self, scope: Any) -> str | None:
        """Lets a request pass, and gives back its Origin, if it has one.

        The client's name is in the scope afterwards, under `CLIENT`.

        Raises:
            ApiError: 400, 401 or 403.
        """
        host = origin = key = None
        for name, value in scope["headers"]:
            if name == b"host":
                if host is not None:
                    raise ApiError(400, "the request has more than one Host header")
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"x-api-key":
                key = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
        if host is None:
            raise ApiError(400, "the request has no Host header")
        if not self._knows(f"//{host}"):
            raise _foreign(f"the host {host!r}")
        if origin is not None and not self._knows(origin):
            raise _foreign(f"pages from {origin!r}")
        if scope["method"] != "OPTIONS" and scope["path"] not in self._open_paths:
            name = scope[CLIENT] = self._name_of(key)
            if name is None:
                raise ApiError(
                    401,
                    "this service needs a key: send `Authorization: Bearer KEY` with the value of "
                    "TQSTACK_API_KEY, or with a key that `tqstack key add` made",
                    code="invalid_api_key",
                )
        return origin

    def _knows(self, url: str) -> bool:
        try:
            name = (urlsplit(url).hostname or "").rstrip(".").lower()
        except ValueError:
            return False
        if name in self._names:
            return True
        # Rebinding needs a name. An address is one of ours, or we were not reached.
        return url.startswith("//") and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _foreign(what: str) -> ApiError:
    return ApiError(
        403,
        f"this service does not answer {what}; if it should, add the name to ROUTER_ALLOWED_HOSTS",
        code="forbidden",
    )


class Guarded:
    """A guard in front of an ASGI application."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._guard.check(scope)
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
                return await response(scope, receive, send)
        await self._app(scope, receive, send)


def cors_headers(origin: str) -> list[tuple[bytes, bytes]]:
    """For an answer to a page from `origin`."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"*"),
        (b"vary", b"origin"),
    ]


async def preflight(send: Any) -> None:
    """Answers a browser's question whether a page may send a request."""
    await send({"type": "http.response.start", "status": 204, "headers": _PREFLIGHT})
    await send({"type": "http.response.body", "body": b""})
