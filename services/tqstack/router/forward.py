"""The hot path: a client's request to a backend, and to the other one if that fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from tqstack.openai_api.body import ClientGone, read_body
from tqstack.openai_api.errors import ApiError
from tqstack.openai_api.schema import Passing, parse_json, validate
from tqstack.router.amend import amended, ignored
from tqstack.router.backends import Backend
from tqstack.router.client import Client
from tqstack.router.dialects import Dialect
from tqstack.router.encoding import decode
from tqstack.router.estimate import Estimator, Size, measure
from tqstack.router.exact import NEAR, ExactCounter
from tqstack.router.failure import Failure
from tqstack.router.journal import Journal, Record
from tqstack.router.metrics import Metrics
from tqstack.router.needs import is_background, needs_of
from tqstack.router.policy import Ask, Decision, Name, View, decide, split_model, threshold_for
from tqstack.router.prefill import begun_by
from tqstack.router.relay import Relay
from tqstack.router.rewrite import with_model
from tqstack.router.upstream import Upstream
from tqstack.settings import Settings

log = logging.getLogger(__name__)

# How far an estimate may be off before a prompt counts as too long for a backend; nearer than that,
# the backend's own count decides.
_SLACK = 0.25
_CHAT = "/v1/chat/completions"
_AMENDED = frozenset({_CHAT, "/v1/completions"})
_EXPENSIVE_SECONDS = 10.0  # a failure after so long is not worth the SDK's automatic retries


@dataclass(frozen=True)
class Services:
    """What all exchanges share."""

    settings: Settings
    upstream: Upstream
    backends: Mapping[Name, Backend]
    estimator: Estimator
    counter: ExactCounter
    journal: Journal
    metrics: Metrics


class Endpoint(NamedTuple):
    """A path that goes to a backend.

    Attributes:
        schema: what its request must look like, in terms of chat if there is a dialect.
        dialect: how to translate it for a backend that does not know the path.
        needs: what a backend must be able to do, whatever the request holds.
        counted: the answer to a request that asks for its prompt's tokens only.
    """

    path: str
    schema: type[Passing]
    dialect: Dialect | None = None
    needs: frozenset[str] = frozenset()
    counted: Callable[[int], dict[str, Any]] | None = None


class Forward:
    """An ASGI application that answers the requests for one endpoint through a backend."""

    def __init__(self, endpoint: Endpoint, services: Services):
        self._endpoint = endpoint
        self._services = services

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = self._endpoint
        client = Client(receive, send, endpoint.dialect)
        record = self._services.journal.begin(endpoint.path)
        loop = asyncio.get_running_loop()  # a system call, before Python 3.12: made once
        task = asyncio.current_task(loop)
        assert task
        watcher: asyncio.Task[None] | None = None
        try:
            limit = self._services.settings.router_body_limit_mb << 20
            body = await read_body(receive, limit)
            # Without a watcher a client that goes away is noticed at the next send only.
            watcher = loop.create_task(client.watch(task))
            for name, value in scope["headers"]:
                if name == b"content-encoding":
                    body = decode(body, value.decode("latin-1"), limit)
            exchange = self._exchange(client, record, body)
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

    def _exchange(self, client: Client, record: Record, body: bytes) -> Exchange:
        """
        Raises:
            ApiError: 400, if the body is no request that can be met.
        """
        endpoint, request = self._endpoint, parse_json(body)
        if endpoint.dialect is None:
            validate(endpoint.schema, request)
            return Exchange(self._services, client, record, endpoint, body, request, request)
        resolved = endpoint.dialect.resolve(request)
        if resolved is not request:
            body = orjson.dumps(resolved)
        chat = endpoint.dialect.to_chat(resolved)
        validate(endpoint.schema, chat)
        exchange = Exchange(self._services, client, record, endpoint, body, resolved, chat)
        exchange.original = request
        return exchange


class Exchange:
    """One request, from its parsed body to the last byte of its answer."""

    def __init__(
        self,
        services: Services,
        client: Client,
        record: Record,
        endpoint: Endpoint,
        body: bytes,
        request: dict[str, Any],
        chat: dict[str, Any],
    ):
        self._services = services
        self._client = client
        self._record = record
        self._endpoint = endpoint
        self._body = body
        self._request = request
        self._chat = chat  # the same, in terms of chat
        self.original = request  # as it came
        self._size: Size = measure(chat)
        self._relay: Relay | None = None
        # Each text to embed is a prompt of its own: their sum says nothing.
        self._slack = 1.0 if "embeddings" in endpoint.needs else _SLACK
        record.model = request.get("model") or ""
        # What is asked of one kind of backend only is no text: it comes in one piece.
        record.stream = bool(request.get("stream")) and not endpoint.needs

    async def run(self) -> None:
        """Answers the client.

        Raises:
            ApiError: no backend can take this request.
        """
        step: Decision | None = await self._decide()
        dialect, record = self._endpoint.dialect, self._record
        if record.stream:
            if dialect:
                self._client.stream = dialect.stream(self.original, record.estimate or 0)
            seconds = self._services.settings.router_ping_seconds
            self._client.ping_every(seconds, self._record.headers, self._progress)
        try:
            while step:
                step = await self._try(step)
        finally:
            await self._client.stop_pings()

    async def count(self, answer: Callable[[int], dict[str, Any]]) -> None:
        """Tells the client its prompt's tokens, for the model that would answer.

        Raises:
            ApiError: nobody has this model.
        """
        services, record = self._services, self._record
        step: Decision | None = None
        try:
            step = await self._decide()
        except ApiError as error:  # nobody is there, or holds it: it can be counted all the same
            if error.code == "model_not_found":
                raise
        tokens = None
        if step:
            backend = services.backends[step.backend]
            tokens = await backend.count_tokens({**self._chat, "model": step.model})
        if tokens is None and (step is None or step.backend == "sidecar"):
            tokens = await services.counter.count(self._chat)
        record.estimate = tokens or record.estimate
        record.outcome, record.status = "ok", 200
        await self._client.json(200, answer(record.estimate or 0), record.headers())

    async def _decide(self) -> Decision:
        services, record = self._services, self._record
        backends = services.backends.values()
        if not all(backend.health.asked for backend in backends):
            await asyncio.gather(*(backend.check() for backend in backends))
        sidecar = services.backends["sidecar"]
        threshold = threshold_for(services.settings.prompt_token_threshold, sidecar.architecture)
        views: dict[Name, View] = {backend.name: backend.view() for backend in backends}
        ask = self._ask(views)
        if sidecar.enabled and abs(ask.tokens["sidecar"] / threshold - 1) < NEAR:
            tokens = await services.counter.count(self._chat)
            if tokens is not None:
                ask = replace(ask, tokens={**ask.tokens, "sidecar": tokens})
        record.estimate = ask.tokens["sidecar"]
        try:
            decision = decide(ask, views, threshold)
        except ApiError as error:
            if error.status != 503:
                raise
            # Nobody is there, by the last probe; perhaps somebody is now.
            await asyncio.gather(*(backend.check() for backend in backends))
            decision = decide(ask, {b.name: b.view() for b in backends}, threshold)
        record.decision, record.estimate = decision, decision.tokens
        return decision

    def _ask(self, views: Mapping[Name, View]) -> Ask:
        name, estimate = split_model(self._record.model)[1], self._services.estimator.tokens
        tokens: dict[Name, int] = {
            backend: estimate(view.name_for(name), self._size) for backend, view in views.items()
        }
        needs = self._endpoint.needs or needs_of(self._chat, self._size.images)
        background = is_background(self._chat)
        return Ask(self._record.model, tokens, self._slack, needs, background)

    def _progress(self) -> str:
        comment = self._relay.watch.comment if self._relay else ""
        return comment or "waiting for the first token"

    async def _try(self, step: Decision) -> Decision | None:
        """Answers through one backend, or gives back the step to try next."""
        services, record, client = self._services, self._record, self._client
        backend = services.backends[step.backend]
        record.decision, record.estimate = step, step.tokens
        path, dialect = self._endpoint.path, self._endpoint.dialect
        native = dialect is None or backend.speaks(path)
        if native:
            body = self._native_body(backend, step.model)
        else:
            chat = amended(self._chat) if backend.is_ollama else self._chat
            body, path = orjson.dumps({**chat, "model": step.model}), _CHAT
        record.left_out = [] if native or not dialect else dialect.left_out(self._request)
        if backend.is_ollama:
            sent = self._request if native else self._chat
            record.left_out += ignored(path, sent)
        relay = Relay(backend, services.settings, services.upstream, client, record)
        if backend.is_ollama and path == _CHAT:
            relay.begun = begun_by(self._chat)
        if dialect:
            relay.speak(dialect, self.original, translated=not native)
        self._relay = relay
        backend.begin()
        try:
            await backend.check_context(
                step.model,
                step.tokens * (1 - self._slack),
                services.settings.router_first_token_seconds,
            )
            await relay.run(backend.url + path, body)
        except Failure as failure:
            if dialect and native and failure.kind in ("status-404", "status-405", "status-501"):
                backend.does_not_speak(path)
                return step
            log.warning("request %d: %s failed it: %s", record.id, step.backend, failure)
            backend.failed(failure)
            if step.next and failure.elsewhere and not client.answered:
                record.failures.append(f"{step.backend} {failure.kind}")
                await client.note(f"{step.backend} failed; asking {step.next.backend}")
                return step.next
            await self._give_up(failure, step)
        else:
            record.outcome = "ok"
            backend.succeeded()
            if record.prompt_tokens:
                services.estimator.learn(step.model, self._size, record.prompt_tokens)
        finally:
            backend.end()
        return None

    def _native_body(self, backend: Backend, model: str) -> bytes:
        """The request as it came, as far as the backend reads it."""
        if backend.is_ollama and self._endpoint.path in _AMENDED:
            request = amended(self._request)
            if request is not self._request:
                return orjson.dumps({**request, "model": model})
        return with_model(self._body, self._request, model)

    async def _give_up(self, failure: Failure, step: Decision) -> None:
        client, record, error = self._client, self._record, failure.error
        record.outcome, record.error, record.status = "failed", str(failure), error.status
        await client.stop_pings()
        if failure.elsewhere and step.no_next and not client.answered:
            error.message += f" ({step.no_next})"
        if time.perf_counter() - record.began > _EXPENSIVE_SECONDS:
            error.retry = False
        if client.answered and not record.stream:
            return  # an error has no place inside a JSON body: the connection is cut instead
        await client.fail(error, record.headers())
