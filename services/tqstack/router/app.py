"""The router as an application: its routes, and what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from tqstack.openai_api.describe import Bodies, describe
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.guard import Guard, cors_headers, preflight
from tqstack.openai_api.handlers import add_error_handlers
from tqstack.openai_api.schema import (
    ChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Passing,
    PassingChat,
    PassingText,
    TextRequest,
    TokenizeRequest,
)
from tqstack.router import views
from tqstack.router.backends.backend import Backend
from tqstack.router.backends.definition import Definition, definitions
from tqstack.router.backends.roster import Roster
from tqstack.router.client import Client
from tqstack.router.clients import Clients
from tqstack.router.dialects import messages, responses
from tqstack.router.dialects.messages import Messages, TokenCount, message_tokens
from tqstack.router.dialects.responses import InputTokens, Responses, input_tokens
from tqstack.router.dialects.stored import ResponseStore
from tqstack.router.estimate import Estimator
from tqstack.router.exact import ExactCounter
from tqstack.router.forward import Forward
from tqstack.router.journal import Journal
from tqstack.router.keys import Keys
from tqstack.router.metrics import Metrics
from tqstack.router.prefixes import Prefixes
from tqstack.router.reload import reloading_at_hangup
from tqstack.router.services import Endpoint, Services
from tqstack.router.slots import Slots
from tqstack.router.upstream import Upstream
from tqstack.settings import Settings

ANSWERS = ResponseStore()  # that requests may refer to
# The paths that go to a backend, and what their bodies must look like.
FORWARDED = [
    Endpoint("/v1/chat/completions", PassingChat),
    Endpoint("/v1/completions", PassingText),
    Endpoint("/v1/embeddings", EmbeddingRequest, needs=frozenset({"embeddings"})),
    Endpoint("/v1/responses", ChatRequest, Responses(ANSWERS)),
    Endpoint("/v1/messages", ChatRequest, Messages()),
    Endpoint("/v1/responses/input_tokens", ChatRequest, InputTokens(ANSWERS), counted=input_tokens),
    Endpoint("/v1/messages/count_tokens", ChatRequest, TokenCount(), counted=message_tokens),
    Endpoint("/tokenize", Passing, needs=frozenset({"tokenize"})),
    Endpoint("/detokenize", Passing, needs=frozenset({"tokenize"})),
]
# What it tells of these bodies; where the sidecar's rules are told, Ollama may take more.
_BODIES: Bodies = {
    "/v1/chat/completions": [ChatRequest],
    "/v1/completions": [TextRequest],
    "/v1/embeddings": [EmbeddingRequest],
    "/v1/responses": responses.BODY,
    "/v1/messages": messages.BODY,
    "/v1/responses/input_tokens": responses.BODY,
    "/v1/messages/count_tokens": messages.COUNT_BODY,
    "/tokenize": [ChatRequest, TokenizeRequest],
    "/detokenize": [DetokenizeRequest],
}
# The paths that the router answers by itself.
VIEWS = [
    ("/", views.page),
    ("/v1/models", views.models),
    ("/v1/models/{name:path}", views.model),
    ("/health", views.health),
    ("/status", views.status),
    ("/metrics", views.metrics),
]


class RouterApp(FastAPI):
    """FastAPI, but for the requests that go to a backend: those take a bare ASGI path.

    The layers of the framework would cost such a request more than everything that is done for it.
    """

    forwards: dict[str, Forward]
    guard: Guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        try:
            origin = self.guard.check(scope)
        except ApiError as error:
            return await Client(receive, send).fail(error)
        if origin:
            send = _with_headers(send, cors_headers(origin))
        if scope["method"] == "POST" and (forward := self.forwards.get(scope["path"])):
            return await forward(scope, receive, send)
        if scope["method"] == "OPTIONS":
            return await preflight(send)
        await super().__call__(scope, receive, send)


def _with_headers(send: Any, extra: list[tuple[bytes, bytes]]) -> Any:
    async def sender(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *extra]}
        await send(message)

    return sender


def create_app(settings: Settings) -> RouterApp:
    """The router, ready to be served. Its backends need not be there.

    Raises:
        SettingsError: the file of backends or of keys cannot be used.
    """
    found, keys = definitions(settings), Keys(settings)

    @asynccontextmanager
    async def lifespan(app: RouterApp) -> AsyncIterator[None]:
        upstream = Upstream(settings.router_connect_seconds)
        services = app.state.services = _services(settings, upstream, Clients(keys))
        services.backends.replace(found)
        app.forwards = {e.path: Forward(e, services) for e in FORWARDED}
        with reloading_at_hangup(services):
            yield
        services.backends.close()
        upstream.close()

    app = RouterApp(title="tqstack router", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.forwards = {}
    # The status page has no data of its own, and asks for the key.
    app.guard = Guard(settings.known_hosts(settings.router_host), keys.name_of, open_paths=("/",))
    for path, endpoint in VIEWS:
        app.add_api_route(path, endpoint, methods=["GET"])
    app.add_api_route("/reload", views.reload, methods=["POST"])
    describe(app, _BODIES)
    add_error_handlers(app, [endpoint.path for endpoint in FORWARDED])
    return app


def _services(settings: Settings, upstream: Upstream, clients: Clients) -> Services:
    def make(definition: Definition) -> Backend:
        return Backend(
            definition,
            upstream,
            hung_seconds=settings.router_hung_seconds,
            still_seconds=settings.router_first_token_seconds,
        )

    backends = Roster(make)
    counter = ExactCounter(settings.model_name)
    slots = Slots(settings.router_max_queue)
    metrics = Metrics(backends, slots, clients)
    journal = Journal(metrics.observe)
    return Services(
        settings,
        upstream,
        backends,
        Estimator(),
        counter,
        Prefixes(),
        slots,
        clients,
        journal,
        metrics,
    )
