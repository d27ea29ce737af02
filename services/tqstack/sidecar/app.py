"""The sidecar's HTTP side: requests in, engine events out as answers or streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from tqstack.engine.engine import Engine
from tqstack.engine.jobs import JobError, Progress
from tqstack.engine.worker import Worker
from tqstack.models.runtime import Runtime
from tqstack.models.spec import resolve
from tqstack.openai_api import sse
from tqstack.openai_api.body import read_body
from tqstack.openai_api.describe import Bodies, describe
from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.guard import Guard, Guarded
from tqstack.openai_api.handlers import add_error_handlers
from tqstack.openai_api.schema import (
    ANY_MODEL,
    ChatRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    RequestType,
    TextRequest,
    TokenizeRequest,
    parse_json,
    validate,
)
from tqstack.ranks.group import Group
from tqstack.ranks.leader import Leader
from tqstack.settings import Settings
from tqstack.sidecar.answers import Answer, Usage
from tqstack.sidecar.generation import Finish, Generation, as_api_error, make_generations
from tqstack.sidecar.loader import Loader, new_worker
from tqstack.sidecar.metrics import Metrics
from tqstack.sidecar.prompt import chat_prompt, check_tokens
from tqstack.sidecar.sequences import best, run_all
from tqstack.sidecar.streaming import EventStream, WhileConnected

# What requests may ask for beyond text; the router sends others elsewhere.
CAPABILITIES = [
    "tools",
    "tool_choice",
    "choices",
    "prompts",
    "logprobs",
    "text_logprobs",
    "logit_bias",
    "echo",
    "json_object",
    "json_schema",
    "guided",
]
# What the bodies of POSTs may be.
_BODIES: Bodies = {
    "/v1/chat/completions": [ChatRequest],
    "/v1/completions": [TextRequest],
    "/v1/embeddings": [EmbeddingRequest],
    "/tokenize": [ChatRequest, TokenizeRequest],
    "/detokenize": [DetokenizeRequest],
}


class Sidecar:
    """The handlers, and what they share."""

    def __init__(self, engine: Engine, loader: Loader, settings: Settings):
        self._engine = engine
        self._loader = loader
        self._id, path = resolve(settings.model_name)
        self._names = (self._id, path, *ANY_MODEL)
        self._metrics = Metrics(engine, loader.group)
        self._body_limit = settings.router_body_limit_mb << 20  # what the router lets pass

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, TextRequest)

    async def tokenize(self, request: Request) -> Response:
        """A chat's prompt, or a text, as tokens, as vLLM answers it. Loads no model."""
        value = parse_json(await read_body(request.receive, self._body_limit))
        runtime = self._loaded()
        if "messages" in value:
            chat = self._checked(ChatRequest, value)
            prompt = await asyncio.to_thread(chat_prompt, runtime.tokenizer, chat)
            tokens = prompt.tokens
        else:
            text = self._checked(TokenizeRequest, value)
            tokens = await asyncio.to_thread(
                runtime.tokenizer.encode,
                text.prompt,
                add_special_tokens=text.add_special_tokens,
            )
        facts = {"count": len(tokens), "max_model_len": runtime.context_length}
        return JSONResponse({**facts, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """Tokens as text."""
        parsed = await self._parsed(request, DetokenizeRequest)
        tokenizer = self._loaded().tokenizer
        check_tokens(tokenizer, parsed.tokens, "tokens")
        text = tokenizer.decode(parsed.tokens, clean_up_tokenization_spaces=False)
        return JSONResponse({"prompt": text})

    async def embeddings(self, request: Request) -> Response:
        raise ApiError(
            501,
            "the sidecar makes no embeddings; ask the router with a model of Ollama's, such as "
            "ollama:nomic-embed-text",
            code="unsupported",
            retry=False,
        )

    async def models(self, request: Request) -> Response:
        facts = self._engine.lifecycle.facts
        data = [model_card(facts.describe())] if facts else []
        return JSONResponse({"object": "list", "data": data})

    async def model(self, name: str) -> Response:
        self._check_name(name)
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
        if self._loader.group is not None:
            body["ranks"] = self._loader.group.status()
        if engine.error:
            body["error"] = engine.error
        body["model"] = facts.describe() if facts else {"id": self._id}
        body["capabilities"] = CAPABILITIES
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
        made = await asyncio.to_thread(make_generations, self._engine, runtime, parsed)
        legacy = isinstance(parsed, ChatRequest) and parsed.legacy_functions
        told = parsed.wanted_logprobs is not None
        answer = Answer(runtime.id, chat=kind is ChatRequest, legacy=legacy, logprobs=told)
        if parsed.stream:
            return EventStream(lambda: stream_events(self._engine, made, answer, parsed))
        return WhileConnected(lambda: whole_answer(self._engine, made, answer, parsed))

    async def _parsed(self, request: Request, kind: type[RequestType]) -> RequestType:
        body = await read_body(request.receive, self._body_limit)
        return self._checked(kind, parse_json(body))

    def _checked(self, kind: type[RequestType], value: dict[str, Any]) -> RequestType:
        parsed = validate(kind, value)
        self._check_name(parsed.model)
        return parsed

    def _loaded(self) -> Runtime:
        if (worker := self._engine.worker) is None:
            raise self._not_ready()
        return worker.runtime

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
    settings: Settings,
    on_failure: Callable[[Exception], None] | None = None,
    group: Group | None = None,
) -> FastAPI:
    """The application; its model is loaded in the background once it starts, or when needed.

    Args:
        on_failure: told if the model cannot be loaded.
        group: of ranks that divide the model, of which this is rank 0.

    Raises:
        ValueError: there is no such model; the message says what to do.
    """
    loader = Loader(settings, group)
    make = partial(Leader, group) if group else Worker
    unloaded = loader.planned() if settings.loads_lazily else None
    idle = settings.sidecar_idle_unload_seconds
    work = partial(new_worker, settings, group=group, make=make)
    engine = Engine(loader.load, work, on_failure, unloaded, idle)
    sidecar = Sidecar(engine, loader, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", sidecar.chat_completions),
        ("POST", "/v1/completions", sidecar.completions),
        ("POST", "/v1/embeddings", sidecar.embeddings),
        ("POST", "/tokenize", sidecar.tokenize),
        ("POST", "/detokenize", sidecar.detokenize),
        ("GET", "/v1/models", sidecar.models),
        ("GET", "/v1/models/{name:path}", sidecar.model),
        ("GET", "/health", sidecar.health),
        ("GET", "/metrics", sidecar.metrics),
    ]
    app = FastAPI(title="tqstack sidecar", lifespan=lifespan, docs_url=None, redoc_url=None)
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    describe(app, _BODIES)
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


async def whole_answer(
    engine: Engine,
    generations: list[Generation],
    answer: Answer,
    request: ChatRequest | TextRequest,
) -> dict[str, Any]:
    """Run to the end and answer in one piece."""
    async with aclosing(run_all(engine, generations)) as pieces:
        async for generation, piece in pieces:
            if not isinstance(piece, Progress | Finish):
                generation.choice.parts.append(piece)
    choices = [generation.choice for generation in best(generations, request)]
    return answer.whole(choices, total_usage(generations))


async def stream_events(
    engine: Engine,
    generations: list[Generation],
    answer: Answer,
    request: ChatRequest | TextRequest,
) -> AsyncIterator[bytes]:
    """Server-sent events of a run; while a prompt is processed, comments tell how far it is."""
    opened: set[int] = set()
    running_usage = request.wants_running_usage

    def event(chunk: dict[str, Any]) -> bytes:
        if running_usage:
            chunk = {**chunk, "usage": total_usage(generations).as_dict()}
        return sse.event(chunk)

    async with aclosing(run_all(engine, generations)) as pieces:
        async for generation, piece in pieces:
            choice = generation.choice
            if isinstance(piece, Progress):
                yield sse.comment(f"prefill {piece.done}/{piece.total}")
                continue
            # Not before the first token: until then a router may still go elsewhere.
            if choice.index not in opened and (opening := answer.opening(choice)):
                yield event(opening)
            opened.add(choice.index)
            finished = isinstance(piece, Finish)
            yield event(answer.closing(choice) if finished else answer.chunk(choice, piece))
    if request.wants_usage:
        yield sse.event(answer.usage_chunk(total_usage(generations)))
    yield sse.DONE


def total_usage(generations: list[Generation]) -> Usage:
    """Of all answers; a prompt counts once, however many samples it has."""
    total, counted = Usage(0, 0, 0), set()
    for generation in generations:
        usage, prompt = generation.usage, id(generation.prompt)
        if prompt in counted:
            usage = replace(usage, prompt_tokens=0, cached_tokens=0)
        counted.add(prompt)
        total += usage
    return total
