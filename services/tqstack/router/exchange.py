"""One request: who may answer it, and trying them in turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from tqstack.openai_api.errors import ApiError
from tqstack.router.amend import amended, ignored
from tqstack.router.backends.backend import Backend
from tqstack.router.backends.load import Load, Reading
from tqstack.router.client import Client
from tqstack.router.estimate import Size, measure
from tqstack.router.exact import NEAR
from tqstack.router.failure import Failure, loop_detected
from tqstack.router.journal import Record
from tqstack.router.needs import is_background, needs_of
from tqstack.router.offers import Offers, View, offers_of
from tqstack.router.policy import Ask, Candidate, Route, decide, threshold_for
from tqstack.router.prefill import begun_by
from tqstack.router.prefixes import Boundary, boundaries
from tqstack.router.relay import Relay
from tqstack.router.rewrite import with_model
from tqstack.router.services import VIA, Endpoint, Services

log = logging.getLogger(__name__)

# How far an estimate may be off before a prompt counts as too long for a backend; nearer than that,
# the backend's own count decides.
_SLACK = 0.25
_CHAT = "/v1/chat/completions"
_AMENDED = frozenset({_CHAT, "/v1/completions"})
_NOBODY: frozenset[str] = frozenset()
_MOST_HOPS = 4  # from router to router
_WORTH_CACHING = 256  # tokens: backends keep whole blocks
_EXPENSIVE_SECONDS = 10.0  # a failure after so long is not worth the SDK's automatic retries


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
        via: tuple[str, ...],
    ):
        self._services = services
        self._backends = services.backends.current
        self._client = client
        self._record = record
        self._endpoint = endpoint
        self._body = body
        self._request = request
        self._via = via
        self._chat = chat  # the same, in terms of chat
        self.original = request  # as it came
        self._size: Size = measure(chat)
        self._background = is_background(chat)
        self._prompt: list[Boundary] = []
        self._read: dict[str, int] = {}  # tokens of it by backend, as far as is known
        self._asked: Ask
        self._relay: Relay | None = None
        # Each text to embed is a prompt of its own: their sum says nothing.
        self._slack = 1.0 if "embeddings" in endpoint.needs else _SLACK
        record.model = request.get("model") or ""
        # What is asked of one kind of backend only is no text: it comes in one piece.
        record.stream = bool(request.get("stream")) and not endpoint.needs

    async def run(self) -> None:
        """Answers the client.

        Raises:
            ApiError: no backend can take this request, or its client may not send it now.
        """
        route = await self._decide()
        clients, record = self._services.clients, self._record
        estimate = record.estimate or 0
        clients.begin(record.client, estimate)
        try:
            await self._answer(route)
        finally:
            clients.end(record, estimate)

    async def _answer(self, route: Route) -> None:
        dialect, record = self._endpoint.dialect, self._record
        if record.stream:
            if dialect:
                self._client.stream = dialect.stream(self.original, record.estimate or 0)
            seconds = self._services.settings.router_ping_seconds
            self._client.ping_every(seconds, self._record.headers, self._progress)
        untried = list(route.candidates)
        try:
            while untried:
                load = await self._slot(untried)
                try:
                    await self._try(untried, route.alone)
                finally:
                    self._services.slots.free(load)
        finally:
            await self._client.stop_pings()

    async def _slot(self, untried: list[Candidate]) -> Load:
        """A slot at the first of these that has one, which is put first.

        Raises:
            ApiError: 429, if they are all full, and too many requests wait.
        """
        loads = [self._backends[candidate.backend].load for candidate in untried]
        record, first = self._record, untried[0]
        take = self._services.slots.take
        try:
            load = await take(loads, record.client, self._background, self._wait)
        finally:
            record.position = None
        chosen = untried.pop(loads.index(load))
        if chosen is not first:
            reason = f"{first.backend}-full"
            chosen = chosen._replace(reason=reason, fallback_from=first.backend)
        untried.insert(0, chosen)
        return load

    def _wait(self, position: Callable[[], int]) -> None:
        self._record.position = position

    async def count(self, answer: Callable[[int], dict[str, Any]]) -> None:
        """Tells the client its prompt's tokens, for the model that would answer.

        Raises:
            ApiError: nobody has this model.
        """
        record = self._record
        best: Candidate | None = None
        try:
            best = (await self._decide()).candidates[0]
        except ApiError as error:  # nobody is there, or holds it: it can be counted all the same
            if error.code == "model_not_found":
                raise
        tokens = None
        backend = self._backends[best.backend] if best else None
        if backend and best:
            tokens = await backend.count_tokens({**self._chat, "model": best.model})
        if tokens is None and (backend is None or backend.kind == "sidecar"):
            tokens = await self._services.counter.count(self._chat)
        record.estimate = tokens or record.estimate
        record.outcome, record.status = "ok", 200
        await self._client.json(200, answer(record.estimate or 0), record.headers())

    async def _decide(self) -> Route:
        record, backends = self._record, self._backends.values()
        if not all(backend.probe.health.asked for backend in backends):
            await self._look()
        offers = self._offers()
        ask, measure = self._ask(offers), offers.measure
        record.estimate = next(iter(ask.tokens.values()))
        if measure:
            ask = await self._counted(ask, measure)
            record.estimate = ask.tokens[measure.name]
        try:
            route = self._route(ask, offers)
        except ApiError as error:
            if error.status != 503:
                raise
            # Nobody is there, by the last probe; perhaps somebody is now.
            await self._look()
            offers = self._offers()
            ask = self._ask(offers)
            route = self._route(ask, offers)
        self._asked = ask
        self._choose(route.candidates[0])
        return route

    def _offers(self) -> Offers:
        """Of the backends that may answer.

        Raises:
            ApiError: 400, if none of them has the model; 508, if the request has come from each.
        """
        been = {*self._via, self._services.id}
        views = [backend.view() for backend in self._backends.values()]
        views = tuple(view for view in views if view.router not in been)
        alone = all(view.state == "off" for view in views)
        if alone or self._services.id in self._via or len(self._via) >= _MOST_HOPS:
            raise loop_detected(self._via)
        return offers_of(views, self._record.model)

    async def _look(self) -> None:
        await asyncio.gather(*(backend.probe.check() for backend in self._backends.values()))

    def _route(self, ask: Ask, offers: Offers) -> Route:
        return decide(ask, offers, self._threshold(offers.measure))

    def _threshold(self, measure: View | None) -> int:
        return threshold_for(self._services.settings.prompt_token_threshold, measure)

    async def _counted(self, ask: Ask, measure: View) -> Ask:
        """With the tokens counted, where the estimate is too near the threshold to decide."""
        threshold = self._threshold(measure)
        if measure.kind != "sidecar" or abs(ask.tokens[measure.name] / threshold - 1) >= NEAR:
            return ask
        tokens = await self._services.counter.count(self._chat)
        return replace(ask, tokens={**ask.tokens, measure.name: tokens}) if tokens else ask

    def _ask(self, offers: Offers) -> Ask:
        estimate, backends = self._services.estimator.tokens, self._backends
        by_model = {model: estimate(model, self._size) for model in offers.models}
        tokens = {offer.backend: by_model[offer.model] for offer in offers.all}
        needs = self._endpoint.needs or needs_of(self._chat, self._size.images)
        background = self._background
        busy = frozenset(name for name in tokens if backends[name].busy) if background else _NOBODY
        if len(tokens) == 1:  # nothing to choose
            return Ask(tokens, self._slack, needs, background, busy=busy)
        self._prompt = boundaries(offers.model, self._chat)
        self._read, home = self._services.prefixes.read(self._prompt)
        warm = {b: backends[b].load.warm(read) for b, read in self._read.items() if b in tokens}
        seconds = self._seconds(tokens, warm)
        return Ask(tokens, self._slack, needs, background, warm, home, seconds, busy)

    def _seconds(self, tokens: Mapping[str, int], warm: Mapping[str, int]) -> dict[str, float]:
        """Until the first token would come, by backend."""
        backends = self._backends
        return {
            backend: backends[backend].load.seconds(max(0, count - warm.get(backend, 0)))
            for backend, count in tokens.items()
        }

    def _choose(self, candidate: Candidate) -> None:
        self._record.chosen, self._record.estimate = candidate, candidate.tokens

    def _progress(self) -> str:
        if position := self._record.position:
            return f"all backends are busy; position {position()} in the queue"
        comment = self._relay.watch.comment if self._relay else ""
        return comment or "waiting for the first token"

    async def _try(self, untried: list[Candidate], alone: str) -> None:
        """Answers through the first of these, and leaves those that are to be tried after it."""
        services, record, client = self._services, self._record, self._client
        candidate = untried[0]
        backend = self._backends[candidate.backend]
        self._choose(candidate)
        path, dialect = self._endpoint.path, self._endpoint.dialect
        native = dialect is None or backend.speaks(path)
        if native:
            body = self._native_body(backend, candidate.model)
        else:
            chat = amended(self._chat) if backend.is_ollama else self._chat
            body, path = orjson.dumps({**chat, "model": candidate.model}), _CHAT
        record.left_out = [] if native or not dialect else dialect.left_out(self._request)
        if backend.is_ollama:
            sent = self._request if native else self._chat
            record.left_out += ignored(path, sent)
        unread = max(0, candidate.tokens - backend.load.warm(self._read.get(backend.name, 0)))
        reading = backend.load.begin(unread)
        relay = Relay(backend, services.settings, client, record, reading)
        if backend.kind == "openai":
            relay.headers = {VIA: ",".join((*self._via, services.id))}
        if backend.is_ollama and path == _CHAT:
            relay.begun = begun_by(self._chat)
        if dialect:
            relay.speak(dialect, self.original, translated=not native)
        self._relay = relay
        try:
            await backend.check_context(
                candidate.model,
                candidate.tokens * (1 - self._slack),
                services.settings.router_first_token_seconds,
            )
            await relay.run(path, body)
        except Failure as failure:
            if dialect and native and failure.kind in ("status-404", "status-405", "status-501"):
                backend.does_not_speak(path)
                return  # to the same one, in terms of chat
            log.warning("request %d: %s failed it: %s", record.id, backend.name, failure)
            backend.failed(failure)
            following = untried[1:]
            untried.clear()
            if following and failure.elsewhere and not client.answered:
                record.failures.append(f"{backend.name} {failure.kind}")
                self._order_anew(following)
                await client.note(f"{backend.name} failed; asking {following[0].backend}")
                untried += following
                return
            await self._give_up(failure, alone)
        else:
            untried.clear()
            record.outcome = "ok"
            backend.succeeded()
            if record.prompt_tokens:
                services.estimator.learn(candidate.model, self._size, record.prompt_tokens)
        finally:
            backend.load.end(reading)
            if reading.seconds is not None:
                self._learn(candidate, backend, reading, reading.seconds)

    def _order_anew(self, left: list[Candidate]) -> None:
        """By what waits at each now: others whose backend failed them, too, have come there."""
        names = {candidate.backend for candidate in left}
        warm = {name: tokens for name, tokens in self._asked.warm.items() if name in names}
        seconds = self._seconds(self._asked.tokens, warm)
        with contextlib.suppress(ApiError):  # nobody is up any more: they are tried as they are
            route = self._route(replace(self._asked, warm=warm, seconds=seconds), self._offers())
            order = [candidate.backend for candidate in route.candidates]
            left.sort(key=lambda c: order.index(c.backend) if c.backend in order else len(order))

    def _learn(
        self, candidate: Candidate, backend: Backend, reading: Reading, seconds: float
    ) -> None:
        """What the reading of this prompt shows of the backend."""
        record, prefixes, prompt = self._record, self._services.prefixes, self._prompt
        tokens, cached = record.prompt_tokens or candidate.tokens, record.cached_tokens
        expected = min(tokens, self._read.get(backend.name, 0))
        if cached is not None and expected >= _WORTH_CACHING:
            backend.load.learn_cached(expected, cached)
            if 2 * cached < expected:
                prefixes.forget(backend.name, prompt)
        if prompt:
            prefixes.remember(backend.name, prompt, tokens)
        if record.stream and reading.alone:
            unread = tokens - (expected if cached is None else cached)
            backend.load.learn_speed(unread, seconds)

    def _native_body(self, backend: Backend, model: str) -> bytes:
        """The request as it came, as far as the backend reads it."""
        if backend.is_ollama and self._endpoint.path in _AMENDED:
            request = amended(self._request)
            if request is not self._request:
                return orjson.dumps({**request, "model": model})
        return with_model(self._body, self._request, model)

    async def _give_up(self, failure: Failure, alone: str) -> None:
        client, record, error = self._client, self._record, failure.error
        record.outcome, record.error, record.status = "failed", str(failure), error.status
        await client.stop_pings()
        if failure.elsewhere and alone and not client.answered:
            error.message += f" ({alone})"
        if time.perf_counter() - record.began > _EXPENSIVE_SECONDS:
            error.retry = False
        if client.answered and not record.stream:
            return  # an error has no place inside a JSON body: the connection is cut instead
        await client.fail(error, record.headers())
