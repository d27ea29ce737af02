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
from tqstack.sidecar.answers import Choice, Usage
from tqstack.sidecar.defaults import sampling_defaults
from tqstack.sidecar.prompt import Prompt, chat_prompt, text_prompts
from tqstack.sidecar.refusals import refuse_unsupported
from tqstack.sidecar.text import AnswerReader, Content, Part

MOST_SEQUENCES = 64  # of one request
QUEUE_SECONDS = 5  # after which a request that found the queue full may try again


@dataclass(frozen=True)
class Finish:
    reason: str


class Generation:
    """One sequence of a request, ready to run."""

    def __init__(
        self,
        engine: Engine,
        runtime: Runtime,
        request: ChatRequest | TextRequest,
        prompt: Prompt,
        index: int = 0,
        sample: int = 0,
    ):
        """
        Args:
            index: of its choice in the answer.
            sample: which of the samples of its prompt it is.
        """
        self._engine = engine
        self.prompt = prompt
        self.choice = Choice(index)
        self._reader = _reader(runtime, request, prompt)
        self._stop_tokens = frozenset(request.stop_token_ids or ())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._completion_tokens = self._reasoning_tokens = 0
        self._stopped = False  # by a stop token
        self.job = make_job(runtime, request, prompt, sample)
        self.cached_tokens = 0
        # What an answer that begins with its prompt begins with.
        self._first: list[Part] = []
        if isinstance(request, TextRequest) and request.echo:
            text = runtime.tokenizer.decode(prompt.tokens, clean_up_tokenization_spaces=False)
            self._first.append(Content(text))

    def _deliver(self, event: Event) -> None:
        """Called by the engine's thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    @property
    def usage(self) -> Usage:
        return Usage(
            len(self.prompt.tokens),
            self._completion_tokens,
            self.cached_tokens,
            self._reasoning_tokens,
        )

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
                elif isinstance(event, Removed) or self._complete:
                    # After a stop, tokens may still come until the engine has let go.
                    finished = isinstance(event, Removed) or event.finish_reason is not None
                else:
                    for part in self._read(event):
                        yield part
                    finished = event.finish_reason is not None
                    if self._complete and not finished:
                        self._engine.cancel(self.job)
                if finished:
                    assert not isinstance(event, Progress)
                    self.choice.stats = event.stats or {}
                    self.choice.stop_string = self._reader.stop_string
                    self.choice.reason = self._reason(event)
                    yield Finish(self.choice.reason)
        finally:
            if not finished:
                self._engine.cancel(self.job)

    @property
    def _complete(self) -> bool:
        return self._stopped or self._reader.stopped

    def _read(self, token: Token) -> list[Part]:
        self._completion_tokens += 1
        self._reasoning_tokens += self._reader.in_reasoning
        self._stopped = token.id in self._stop_tokens
        ends = token.finish_reason == "stop" or self._stopped
        parts, self._first = self._first, []
        parts += [] if ends else self._reader.feed(token.id)
        if token.finish_reason or self._stopped:
            parts += self._reader.finish()
        return parts

    def _reason(self, last: Event) -> str:
        if self._reader.tool_calls:
            return "tool_calls"
        if self._complete or not isinstance(last, Token):
            return "stop"
        return last.finish_reason or "stop"


def _reader(runtime: Runtime, request: ChatRequest | TextRequest, prompt: Prompt) -> AnswerReader:
    """The reader of one answer; what was written of it for the model, it has read."""
    shown = bool(request.include_stop_str_in_output)
    if isinstance(request, TextRequest):
        return AnswerReader(runtime.tokenizer, request.stop_strings, plain=True, show_stop=shown)
    forced = request.tool_choice not in (None, "auto", "none")
    reader = AnswerReader(
        runtime.tokenizer,
        request.stop_strings,
        None if request.tool_choice == "none" else request.tools,
        prompt.reasoning,
        show_stop=shown,
        one_call=request.parallel_tool_calls is False
        or request.legacy_functions
        or (forced and isinstance(request.tool_choice, dict)),
    )
    for token in prompt.begun:
        reader.feed(token)
    return reader


def make_generations(
    engine: Engine, runtime: Runtime, request: ChatRequest | TextRequest
) -> list[Generation]:
    """All sequences of a request, in the order of their choices.

    Raises:
        ApiError: 400, if it cannot be met.
    """
    refuse_unsupported(request)
    samples = request.n or 1
    prompts = make_prompts(runtime, request)
    if len(prompts) * samples > MOST_SEQUENCES:
        raise bad_request(
            f"{len(prompts)} prompts with {samples} choices each are more than {MOST_SEQUENCES} "
            "answers; send several requests",
            "n",
        )
    wanted = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    return [
        Generation(engine, runtime, request, prompt, index, sample)
        for index, (prompt, sample) in enumerate(wanted)
    ]


def make_prompts(runtime: Runtime, request: ChatRequest | TextRequest) -> list[Prompt]:
    """Tokens of the request's prompts.

    Raises:
        ApiError: 400, if they cannot be made or are too many.
    """
    if isinstance(request, ChatRequest):
        prompts = [chat_prompt(runtime.tokenizer, request)]
    else:
        prompts = text_prompts(runtime.tokenizer, request)
    for prompt in prompts:
        _check_length(runtime, request, len(prompt.tokens))
    return prompts


def _check_length(runtime: Runtime, request: ChatRequest | TextRequest, tokens: int) -> None:
    context = runtime.context_length
    if not tokens:
        raise bad_request("the prompt is empty", "prompt")
    if tokens >= context:
        raise ApiError(
            400,
            f"the prompt has {tokens} tokens; the context of {runtime.id} is "
            f"{context} tokens, the answer included",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
            retry=False,
        )


def make_job(
    runtime: Runtime, request: ChatRequest | TextRequest, prompt: Prompt, sample: int = 0
) -> Job:
    """
    Args:
        sample: which of the samples of its prompt it is; each has a seed of its own.
    """
    room = runtime.context_length - len(prompt.tokens)
    told = sampling_defaults(runtime.spec.path)

    def wish(name: str, otherwise: Any) -> Any:
        value = getattr(request, name)
        return told.get(name, otherwise) if value is None else value

    sampling = Sampling(
        wish("temperature", 1.0),
        wish("top_p", 1.0),
        max(0, wish("top_k", 0)),
        wish("min_p", 0.0),
        None if request.seed is None else (request.seed + sample + 2**63) % 2**64 - 2**63,
        wish("repetition_penalty", None),
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
