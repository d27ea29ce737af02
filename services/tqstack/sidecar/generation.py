"""One request from prompt to parts: the bridge between the event loop and the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqstack.engine.engine import Engine
from tqstack.engine.jobs import Event, Failed, Job, JobError, Progress, Removed, Token
from tqstack.engine.sampling import Sampling
from tqstack.models.runtime import Runtime
from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.schema import ChatRequest, TextRequest
from tqstack.sidecar.answers import Usage
from tqstack.sidecar.prompt import Prompt, chat_prompt, text_prompt
from tqstack.sidecar.text import AnswerReader, Part

QUEUE_SECONDS = 5  # after which a request that found the queue full may try again


@dataclass(frozen=True)
class Finish:
    reason: str


class Generation:
    """A request that has been checked and tokenized, ready to run."""

    def __init__(self, engine: Engine, runtime: Runtime, request: ChatRequest | TextRequest):
        self._engine = engine
        self._chat = isinstance(request, ChatRequest)
        self.prompt = make_prompt(runtime, request)
        tools = request.tools if isinstance(request, ChatRequest) else None
        if isinstance(request, ChatRequest) and request.tool_choice == "none":
            tools = None
        self._reader = AnswerReader(
            runtime.tokenizer,
            request.stop_strings,
            tools,
            self.prompt.reasoning,
            plain=not self._chat,
        )
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._completion_tokens = 0
        self.job = make_job(runtime, request, self.prompt)
        self.cached_tokens = 0
        self.stats: dict[str, Any] = {}

    def _deliver(self, event: Event) -> None:
        """Called by the engine's thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt.tokens), self._completion_tokens, self.cached_tokens)

    async def run(self) -> AsyncGenerator[Progress | Part | Finish, None]:
        """Generate. Closing the iterator early takes the request off the engine.

        Raises:
            ApiError: the engine refused the request, or failed.
        """
        self._loop, finished = asyncio.get_running_loop(), False
        self._engine.submit(self.job, self._deliver)
        try:
            while not finished:
                event = await self._events.get()
                if isinstance(event, Failed):
                    finished = True
                    raise as_api_error(event.error)
                if isinstance(event, Progress):
                    self.cached_tokens = event.cached
                    yield event
                elif isinstance(event, Removed) or self._reader.stopped:
                    # After a stop string, tokens may still come until the engine has let go.
                    finished = isinstance(event, Removed) or event.finish_reason is not None
                else:
                    for part in self._read(event):
                        yield part
                    finished = event.finish_reason is not None
                    if self._reader.stopped and not finished:
                        self._engine.cancel(self.job)
                if finished:
                    assert not isinstance(event, Progress)
                    self.stats = event.stats or {}
                    yield Finish(self._reason(event))
        finally:
            if not finished:
                self._engine.cancel(self.job)

    def _read(self, token: Token) -> list[Part]:
        self._completion_tokens += 1
        parts = [] if token.finish_reason == "stop" else self._reader.feed(token.id)
        return parts + self._reader.finish() if token.finish_reason else parts

    def _reason(self, last: Event) -> str:
        if self._reader.tool_calls:
            return "tool_calls"
        if self._reader.stopped or not isinstance(last, Token):
            return "stop"
        return last.finish_reason or "stop"


def make_prompt(runtime: Runtime, request: ChatRequest | TextRequest) -> Prompt:
    """Tokens of the request.

    Raises:
        ApiError: 400, if they cannot be made or are too many.
    """
    if isinstance(request, ChatRequest):
        refuse_unsupported(request)
        prompt = chat_prompt(runtime.tokenizer, request)
    else:
        prompt = text_prompt(runtime.tokenizer, request)
    if not prompt.tokens:
        raise bad_request("the prompt is empty", "prompt")
    context = runtime.context_length
    if len(prompt.tokens) >= context:
        raise ApiError(
            400,
            f"the prompt has {len(prompt.tokens)} tokens; the context of {runtime.id} is "
            f"{context} tokens, the answer included",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
            retry=False,
        )
    return prompt


def refuse_unsupported(request: ChatRequest) -> None:
    """What the sidecar cannot do is refused: an answer without it would look as if it could."""
    kind = (request.response_format or {}).get("type", "text")
    if request.logprobs:
        raise bad_request(
            "the sidecar gives no logprobs; prefix the model with ollama:", "logprobs"
        )
    if kind != "text":
        raise bad_request(
            f"the sidecar cannot force {kind}; prefix the model with ollama:", "response_format"
        )


def make_job(runtime: Runtime, request: ChatRequest | TextRequest, prompt: Prompt) -> Job:
    room = runtime.context_length - len(prompt.tokens)
    sampling = Sampling(
        1.0 if request.temperature is None else request.temperature,
        1.0 if request.top_p is None else request.top_p,
        request.top_k or 0,
        request.min_p or 0.0,
        request.seed,
        request.repetition_penalty,
        request.presence_penalty,
        request.frequency_penalty,
    )
    limit = request.token_limit or runtime.default_max_tokens
    return Job(
        prompt.tokens,
        min(limit, room),
        sampling,
        prompt.boundaries,
        request.cache_prompt is not False,
    )


STATUS = {"insufficient_memory": 503, "queue_full": 429, "no_model": 503, "engine_error": 500}


def as_api_error(error: JobError) -> ApiError:
    """What the engine refuses, in OpenAI's form."""
    return ApiError(
        STATUS[error.code],
        error.message,
        code=error.code,
        retry=error.code in ("queue_full", "no_model"),
        retry_after=QUEUE_SECONDS if error.code == "queue_full" else None,
    )
