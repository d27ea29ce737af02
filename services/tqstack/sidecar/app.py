"""The sidecar's HTTP side: requests in, engine events out as answers or streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from tqstack.engine.engine import Engine
from tqstack.engine.jobs import JobError, Progress
from tqstack.models.runtime import Runtime
from tqstack.models.spec import resolve
from tqstack.openai_api import sse
from tqstack.openai_api.body import read_body
from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.guard import Guard, Guarded
from tqstack.openai_api.handlers import add_error_handlers
from tqstack.openai_api.schema import (
    ANY_MODEL,
    ChatRequest,
    RequestType,
    TextRequest,
    parse_json,
    validate,
)
from tqstack.settings import Settings
from tqstack.sidecar.answers import Answer
from tqstack.sidecar.generation import Finish, Generation, as_api_error
from tqstack.sidecar.loader import Loader, new_worker
from tqstack.sidecar.metrics import Metrics
from tqstack.sidecar.prompt import chat_prompt
from tqstack.sidecar.streaming import EventStream, WhileConnected


class Sidecar:
    """The handlers, and what they share."""

    def __init__(self, engine: Engine, loader: Loader, settings: Settings):
        self._engine = engine
        self._loader = loader
        self._id, path = resolve(settings.model_name)
        self._names = (self._id, path, *ANY_MODEL)
        self._metrics = Metrics(engine)
        self._body_limit = settings.router_body_limit_mb << 20  # what the router lets pass

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, TextRequest)

    async def tokenize(self, request: Request) -> Response:
        """A chat's prompt as tokens, as vLLM answers it. Loads no model."""
        parsed = await self._parsed(request, ChatRequest)
        worker = self._engine.worker
        if worker is None:
            raise self._not_ready()
        runtime = worker.runtime
        prompt = await asyncio.to_thread(chat_prompt, runtime.tokenizer, parsed)
        facts = {"count": len(prompt.tokens), "max_model_len": runtime.context_length}
        return JSONResponse({**facts, "tokens": prompt.tokens})

    async def models(self, request: Request) -> Response:
        facts = self._engine.lifecycle.facts
        data = [model_card(facts.describe())] if facts else []
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        facts = self._engine.lifecycle.facts
        if facts is None:
            raise self._not_ready()
        return JSONResponse(model_card(facts.describe()))

    async def health(self, request: Request) -> Response:
        """A model that is not in memory is no illness: it is loaded for whoever asks."""
        engine, facts = self._engine, self._engine.lifecycle.facts
        status = "error" if engine.error else "ok" if facts else "loading"
        body: dict[str, Any] = {"status": status, **engine.status()}
        body["lifecycle"]["freed_by_ollama"] = self._loader.freed
        if engine.error:
            body["error"] = engine.error
        body["model"] = facts.describe() if facts else {"id": self._id}
        if facts:
            body["cache"]["codec"] = facts.codec
        if facts and (plan := facts.plan):
            body["cache"]["bytes_per_token"] = plan.per_token
            body["cache"]["bytes_per_token_fp16"] = plan.per_token_fp16
            body["memory_plan"] = plan.as_dict()
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=self._metrics.content_type)

    async def _answer(
        self, request: Request, kind: type[ChatRequest] | type[TextRequest]
    ) -> Response:
        parsed = await self._parsed(request, kind)
        runtime = await self._ready()
        # Template and tokenizer take a second for a very long prompt: not on the event loop.
        generation = await asyncio.to_thread(Generation, self._engine, runtime, parsed)
        answer = Answer(runtime.id, chat=kind is ChatRequest)
        if parsed.stream:
            usage = parsed.wants_usage
            return EventStream(lambda: stream_events(generation, answer, usage))
        return WhileConnected(lambda: whole_answer(generation, answer))

    async def _parsed(self, request: Request, kind: type[RequestType]) -> RequestType:
        body = await read_body(request.receive, self._body_limit)
        parsed = validate(kind, parse_json(body))
        self._check_name(parsed.model)
        return parsed

    async def _ready(self) -> Runtime:
        """The model, which this waits for unless it is the first time: others can serve then."""
        if self._engine.lifecycle.starting:
            raise self._not_ready()
        try:
            return await asyncio.wrap_future(self._engine.ready())
        except JobError as error:
            raise as_api_error(error) from None

    def _not_ready(self) -> ApiError:
        why = self._engine.error or f"{self._id} is being loaded"
        return ApiError(503, why, code="model_not_ready", retry_after=5)

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise bad_request(
                f"the model {name!r} is not here; this sidecar serves {self._id!r}",
                "model",
                "model_not_found",
            )


def create_app(
    settings: Settings, on_failure: Callable[[Exception], None] | None = None
) -> FastAPI:
    """The application; its model is loaded in the background once it starts, or when needed.

    Args:
        on_failure: told if the model cannot be loaded.

    Raises:
        ValueError: there is no such model; the message says what to do.
    """
    loader = Loader(settings)
    unloaded = loader.planned() if settings.loads_lazily else None
    idle = settings.sidecar_idle_unload_seconds
    engine = Engine(loader.load, partial(new_worker, settings), on_failure, unloaded, idle)
    sidecar = Sidecar(engine, loader, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", sidecar.chat_completions),
        ("POST", "/v1/completions", sidecar.completions),
        ("POST", "/tokenize", sidecar.tokenize),
        ("GET", "/v1/models", sidecar.models),
        ("GET", "/v1/models/{name:path}", sidecar.model),
        ("GET", "/health", sidecar.health),
        ("GET", "/metrics", sidecar.metrics),
    ]
    app = FastAPI(title="tqstack sidecar", lifespan=lifespan, docs_url=None, redoc_url=None)
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    add_error_handlers(app)
    hosts = settings.known_hosts(settings.sidecar_host)
    app.add_middleware(Guarded, guard=Guard(hosts, settings.tqstack_api_key))
    return app


def model_card(about: dict[str, Any]) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {
        "id": about["id"],
        "object": "model",
        "created": 0,
        "owned_by": "tqstack",
        "name": f"{about['id']} (long context)",
        **{name: about[name] for name in ("architecture", "context_length") if name in about},
    }


async def whole_answer(generation: Generation, answer: Answer) -> dict[str, Any]:
    """Run to the end and answer in one piece."""
    reason = "stop"
    async with aclosing(generation.run()) as events:
        async for event in events:
            if isinstance(event, Finish):
                reason = event.reason
            elif not isinstance(event, Progress):
                answer.parts.append(event)
    return answer.whole(reason, generation.usage, generation.stats)


async def stream_events(
    generation: Generation, answer: Answer, with_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events of a run; while the prompt is processed, comments tell how far it is."""
    opening = answer.opening()
    async with aclosing(generation.run()) as events:
        async for event in events:
            if isinstance(event, Progress):
                yield sse.comment(f"prefill {event.done}/{event.total}")
                continue
            if opening:
                # Not before the first token: until then a router may still go elsewhere.
                yield sse.event(opening)
                opening = None
            if isinstance(event, Finish):
                yield sse.event(answer.closing(event.reason, generation.stats))
            else:
                yield sse.event(answer.chunk(event))
    if with_usage:
        yield sse.event(answer.usage_chunk(generation.usage))
    yield sse.DONE
