"""The sidecar's HTTP side: requests in, engine events out as answers or streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from tqstack.openai_api import sse
from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.guard import Guard, Guarded
from tqstack.openai_api.handlers import add_error_handlers
from tqstack.openai_api.schema import ChatRequest, TextRequest, parse_json, validate
from tqstack.settings import Settings
from tqstack.sidecar.answers import Answer
from tqstack.sidecar.engine import Engine, Progress
from tqstack.sidecar.generation import Finish, Generation
from tqstack.sidecar.metrics import Metrics
from tqstack.sidecar.runtime import Runtime, load_runtime
from tqstack.sidecar.streaming import EventStream, WhileConnected, read_body

BODY_LIMIT = 64 << 20
# Names that mean "the model that is here".
ANY_MODEL = ("", "auto", "default", "tqstack")


class Sidecar:
    """The handlers, and what they share."""

    def __init__(self, engine: Engine, settings: Settings):
        self._engine = engine
        self._settings = settings
        self._metrics = Metrics(engine)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, TextRequest)

    async def models(self, request: Request) -> Response:
        runtime = self._engine.runtime
        data = [model_card(runtime)] if runtime else []
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        runtime, name = self._ready(), request.path_params["name"]
        if name not in (runtime.id, *ANY_MODEL):
            raise unknown_model(name, runtime)
        return JSONResponse(model_card(runtime))

    async def health(self, request: Request) -> Response:
        engine, runtime = self._engine, self._engine.runtime
        status = "error" if engine.error else "ok" if runtime else "loading"
        body: dict[str, Any] = {"status": status, **engine.status()}
        if engine.error:
            body["error"] = engine.error
        if runtime:
            body["model"] = runtime.describe()
            body["cache"] |= {
                "codec": runtime.codec,
                "bytes_per_token": runtime.plan.per_token,
                "bytes_per_token_fp16": runtime.plan.per_token_fp16,
            }
            body["memory_plan"] = runtime.plan.as_dict()
        else:
            body["model"] = {"id": self._settings.model_name}
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=self._metrics.content_type)

    async def _answer(self, request: Request, kind: type) -> Response:
        parsed = validate(kind, parse_json(await read_body(request, BODY_LIMIT)))
        runtime = self._ready()
        if parsed.model not in (runtime.id, runtime.loaded.path, *ANY_MODEL):
            raise unknown_model(parsed.model, runtime)
        # Template and tokenizer take a second for a very long prompt: not on the event loop.
        generation = await asyncio.to_thread(Generation, self._engine, runtime, parsed)
        answer = Answer(runtime.id, chat=kind is ChatRequest)
        if parsed.stream:
            usage = parsed.wants_usage
            return EventStream(lambda: stream_events(generation, answer, usage))
        return WhileConnected(lambda: whole_answer(generation, answer))

    def _ready(self) -> Runtime:
        if self._engine.runtime is None:
            why = self._engine.error or f"{self._settings.model_name} is being loaded"
            raise ApiError(503, why, code="model_not_ready", retry_after=5)
        return self._engine.runtime


def create_app(
    settings: Settings, on_failure: Callable[[Exception], None] | None = None
) -> FastAPI:
    """The application; its model is loaded in the background once it starts.

    Args:
        on_failure: told if the model cannot be loaded.
    """
    engine = Engine(lambda: load_runtime(settings), on_failure)
    sidecar = Sidecar(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", sidecar.chat_completions),
        ("POST", "/v1/completions", sidecar.completions),
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


def model_card(runtime: Runtime) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    loaded = runtime.loaded
    return {
        "id": loaded.id,
        "object": "model",
        "created": 0,
        "owned_by": "tqstack",
        "name": f"{loaded.id} (long context)",
        "architecture": loaded.architecture,
        "context_length": loaded.context_length,
    }


def unknown_model(name: str, runtime: Runtime) -> ApiError:
    return bad_request(
        f"the model {name!r} is not here; this sidecar serves {runtime.id!r}",
        "model",
        "model_not_found",
    )


async def whole_answer(generation: Generation, answer: Answer) -> dict[str, Any]:
    """Run to the end and answer in one piece."""
    reason = "stop"
    async with aclosing(generation.run()) as events:
        async for event in events:
            if isinstance(event, Finish):
                reason = event.reason
            elif not isinstance(event, Progress):
                answer.parts.append(event)
    return answer.whole(reason, generation.usage, generation.job.stats)


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
                yield sse.event(answer.closing(event.reason, generation.job.stats))
            else:
                yield sse.event(answer.chunk(event))
    if with_usage:
        yield sse.event(answer.usage_chunk(generation.usage))
    yield sse.DONE
