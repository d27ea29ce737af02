"""One request from prompt to parts: the bridge between the event loop and the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from tqstack.engine.engine import Engine
from tqstack.engine.grammar import Grammar
from tqstack.engine.jobs import (
    Deliver,
    Event,
    Failed,
    Job,
    JobError,
    Measured,
    Progress,
    Removed,
    Token,
)
from tqstack.models.runtime import Runtime
from tqstack.openai_api.errors import ApiError, bad_request
from tqstack.openai_api.schema import ChatRequest, TextRequest
from tqstack.sidecar.answers import Choice, Usage
from tqstack.sidecar.detokenizer import text_stream, token_bytes
from tqstack.sidecar.jobs import check_wishes, checked_grammar, make_job, samples
from tqstack.sidecar.logprobs import Spoken, prompt_form, spoken
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
        grammar: Grammar | None = None,
    ):
        """
        Args:
            index: of its choice in the answer.
            sample: which of the samples of its prompt it is.
            grammar: the form of its answer.
        """
        self._engine, self._runtime, self._request = engine, runtime, request
        self.prompt, self.sample = prompt, sample
        self.choice = Choice(index)
        self._events: asyncio.Queue[Progress | Token | Failed | Removed] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._completion_tokens = self._reasoning_tokens = 0
        self._logprob = 0.0  # of all that was drawn
        self.job = make_job(runtime, request, prompt, sample, grammar)
        self.cached_tokens = 0
        # What an answer that begins with its prompt begins with.
        self._echo: str | None = None
        if isinstance(request, TextRequest) and request.echo:
            tokens = prompt.tokens
            self._echo = runtime.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        self._reader = _reader(runtime, request, prompt, len(self._echo or ""))

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens, where that was asked for."""
        return self._logprob / max(1, self._completion_tokens)

    def _deliver(self, event: Event) -> None:
        """Called by the engine's thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._receive, event)

    def _receive(self, event: Event) -> None:
        if isinstance(event, Measured):  # of use to the prompt's other samples too
            found = enumerate(event.logprobs, event.first)
            self.prompt.told.update(found)
        else:
            self._events.put_nowait(event)

    def begin(self) -> tuple[Job, Deliver]:
        """What the engine is to be told, by whoever then runs this."""
        self._loop = asyncio.get_running_loop()
        return self.job, self._deliver

    def stop(self) -> None:
        """Take it off the engine; harmless if it has ended."""
        self._engine.cancel(self.job)

    @property
    def usage(self) -> Usage:
        return Usage(
            len(self.prompt.tokens),
            self._completion_tokens,
            self.cached_tokens,
            self._reasoning_tokens,
        )

    async def run(self) -> AsyncGenerator[Progress | Part | Finish, None]:
        """What the engine, which has been told to begin, makes. Closing the iterator early takes
        the job off the engine.

        Raises:
            ApiError: the engine refused the request, or failed.
        """
        finished = False
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
                    # After a stop, tokens may still come until the engine has let go.
                    finished = isinstance(event, Removed) or event.finish_reason is not None
                elif isinstance(event, Token):
                    for part in self._read(event):
                        yield part
                    finished = event.finish_reason is not None
                    if self._reader.stopped and not finished:
                        self.stop()
                if finished:
                    assert isinstance(event, Token | Removed)
                    self.choice.stats = event.stats or {}
                    self.choice.stop_reason = self._stop_reason(event)
                    self.choice.prompt_logprobs = self._prompt_logprobs()
                    self.choice.reason = self._reason(event)
                    yield Finish(self.choice.reason)
        finally:
            if not finished:
                self.stop()

    def _read(self, token: Token) -> list[Part]:
        parts = self._begun()
        if self._request.token_limit == 0:  # it was drawn because something must be
            return parts
        self._completion_tokens += 1
        self._reasoning_tokens += self._reader.in_reasoning
        self._logprob += token.logprob.value if token.logprob else 0.0
        if not self._ends(token):
            told = token.logprob if self._request.wanted_logprobs is not None else None
            parts += self._reader.feed(token.id, told)
        if token.finish_reason:
            parts += self._reader.finish()
        return parts

    def _ends(self, token: Token) -> bool:
        """Whether a token is the answer's end, and no part of it."""
        shown = self._request.include_stop_str_in_output and token.id in self.job.stop_tokens
        ends = token.finish_reason == "stop" or token.id in self._runtime.end_tokens
        return ends and not shown

    def _begun(self) -> list[Part]:
        """The prompt, where the answer begins with it and has not yet."""
        text, self._echo = self._echo, None
        if text is None:
            return []
        return [Content(text, self._spoken_prompt())]

    def _spoken_prompt(self) -> list[Spoken]:
        if self._request.wanted_logprobs is None:
            return []
        own, told, listed, at = self._runtime.tokenizer, self.prompt.told, [], 0
        stream = text_stream(own)
        for place, token in enumerate(self.prompt.tokens):
            known = told.get(place)
            one = spoken(own, known, at) if known else Spoken(token_bytes(own, token), None, (), at)
            listed.append(replace(one, top=one.top[: self._request.wanted_logprobs]))
            at += len(stream.feed(token))
        return listed

    def _prompt_logprobs(self) -> list[dict[str, Any] | None] | None:
        top = self._request.prompt_logprobs
        if top is None:
            return None
        return prompt_form(self._runtime.tokenizer, self.prompt.tokens, self.prompt.told, top)

    def _reason(self, last: Event) -> str:
        if self._reader.tool_calls:
            return "tool_calls"
        if self._reader.stopped or not isinstance(last, Token):
            return "stop"
        return last.finish_reason or "stop"

    def _stop_reason(self, last: Event) -> str | int | None:
        """The stop string or stop token that ended it."""
        if self._reader.stop_string or not isinstance(last, Token):
            return self._reader.stop_string
        own = last.finish_reason == "stop" and last.id in self.job.stop_tokens
        return last.id if own else None


def _reader(
    runtime: Runtime, request: ChatRequest | TextRequest, prompt: Prompt, before: int
) -> AnswerReader:
    """The reader of one answer, before which so many characters are shown."""
    own, least = runtime.tokenizer, request.min_tokens or 0
    shown = bool(request.include_stop_str_in_output)
    stops = request.stop_strings
    if isinstance(request, TextRequest):
        return AnswerReader(
            own, stops, plain=True, show_stop=shown, min_tokens=least, before=before
        )
    return AnswerReader(
        own,
        stops,
        None if request.tool_choice == "none" else request.tools,
        prompt.reasoning == "open",
        show_stop=shown,
        one_call=request.parallel_tool_calls is False
        or request.legacy_functions
        or isinstance(request.tool_choice, dict),
        min_tokens=least,
    )


def make_generations(
    engine: Engine, runtime: Runtime, request: ChatRequest | TextRequest
) -> list[Generation]:
    """All sequences of a request, in the order of their choices.

    Raises:
        ApiError: 400, if it cannot be met.
    """
    refuse_unsupported(request)
    check_wishes(runtime, request)
    count, prompts = samples(request), make_prompts(runtime, request)
    if len(prompts) * count > MOST_SEQUENCES:
        raise bad_request(
            f"{len(prompts)} prompts with {count} choices each are more than {MOST_SEQUENCES} "
            "answers; send several requests",
            "n",
        )
    grammar = checked_grammar(engine, runtime, request, prompts[0])
    wanted = [(prompt, sample) for prompt in prompts for sample in range(count)]
    return [
        Generation(engine, runtime, request, prompt, index, sample, grammar)
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


STATUS = {
    "bad_grammar": 400,
    "insufficient_memory": 503,
    "queue_full": 429,
    "no_model": 503,
    "engine_error": 500,
}


def as_api_error(error: JobError) -> ApiError:
    """What the engine refuses, in OpenAI's form."""
    return ApiError(
        STATUS[error.code],
        error.message,
        code=error.code,
        retry=error.code in ("queue_full", "no_model"),
        retry_after=QUEUE_SECONDS if error.code == "queue_full" else None,
    )
