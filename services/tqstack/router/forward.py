"""The way in: a client's request becomes an exchange, and whatever ends it is written down."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson

from tqstack.openai_api.body import ClientGone, read_body
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.guard import CLIENT
from tqstack.openai_api.schema import parse_json, validate
from tqstack.router.client import Client
from tqstack.router.encoding import decode
from tqstack.router.exchange import Exchange
from tqstack.router.journal import Record
from tqstack.router.services import VIA, Endpoint, Services

_VIA, _MOST_VIA = VIA.encode(), 16
log = logging.getLogger(__name__)


class Forward:
    """An ASGI application that answers the requests for one endpoint through a backend."""

    def __init__(self, endpoint: Endpoint, services: Services):
        self._endpoint = endpoint
        self._services = services

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = self._endpoint
        client = Client(receive, send, endpoint.dialect)
        record = self._services.journal.begin(endpoint.path, scope[CLIENT])
        loop = asyncio.get_running_loop()  # a system call, before Python 3.12: made once
        task = asyncio.current_task(loop)
        assert task
        watcher: asyncio.Task[None] | None = None
        try:
            limit = self._services.settings.router_body_limit_mb << 20
            body = await read_body(receive, limit)
            # Without a watcher a client that goes away is noticed at the next send only.
            watcher = loop.create_task(client.watch(task))
            via: tuple[str, ...] = ()
            for name, value in scope["headers"]:
                if name == b"content-encoding":
                    body = decode(body, value.decode("latin-1"), limit)
                elif name == _VIA:
                    via = tuple(value.decode("latin-1").split(",")[:_MOST_VIA])
            exchange = self._exchange(client, record, body, via)
            await (exchange.count(endpoint.counted) if endpoint.counted else exchange.run())
        except ApiError as error:
            record.outcome, record.status, record.error = "refused", error.status, error.message
            await client.fail(error, record.headers())
        except ClientGone:
            record.outcome = "gone"
        except asyncio.CancelledError:
            if not client.gone:
                raise
            task.uncancel()
            record.outcome = "gone"
        except Exception:
            log.exception("request %d", record.id)
            record.outcome, record.status, record.error = "failed", 500, "a fault of the router"
            await client.fail(ApiError(500, "the router has a fault; its log says more"))
        finally:
            if watcher:
                watcher.cancel()
            self._services.journal.end(record)

    def _exchange(
        self, client: Client, record: Record, body: bytes, via: tuple[str, ...]
    ) -> Exchange:
        """
        Raises:
            ApiError: 400, if the body is no request that can be met.
        """
        endpoint, request = self._endpoint, parse_json(body)
        if endpoint.dialect is None:
            validate(endpoint.schema, request)
            return Exchange(self._services, client, record, endpoint, body, request, request, via)
        resolved = endpoint.dialect.resolve(request)
        if resolved is not request:
            body = orjson.dumps(resolved)
        chat = endpoint.dialect.to_chat(resolved)
        validate(endpoint.schema, chat)
        exchange = Exchange(self._services, client, record, endpoint, body, resolved, chat, via)
        exchange.original = request
        return exchange
