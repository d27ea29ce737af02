"""One attempt: a request to one backend, and its answer to the client.

Until the client has had a byte, every failure is an exception that leaves the client untouched, so
that another backend may be tried.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from tqstack.router import failure as failures
from tqstack.router.backends.backend import Backend
from tqstack.router.backends.load import Reading
from tqstack.router.client import Client, encode
from tqstack.router.dialects import Dialect
from tqstack.router.failure import Failure
from tqstack.router.journal import Record
from tqstack.router.prefill import Unrepeated
from tqstack.router.repair import ChatRepair, repair_whole
from tqstack.router.upstream import Response, UpstreamError
from tqstack.router.watch import StreamWatch
from tqstack.settings import Settings

# An unstreamed answer up to this size is held until it is whole, so that it can still fall back.
_LARGEST_HELD = 4 << 20
_LARGEST_ERROR = 64 << 10
_PREFILL_TOKENS_PER_SECOND = 20  # a slow machine's, for the limit on the first token
_DRAIN_SECONDS = 1.0
_REFUSAL_SECONDS = 5.0
# What the client is told of an upstream error; 502 of the others.
_STATUSES = {"refused": 503, "hung": 503, "timeout": 504}
_HEADERS = {"content-type": "application/json", "accept-encoding": "identity"}
_KEPT_HEADERS = ("retry-after", "openai-processing-ms")
Change = Callable[[bytes], bytes]


class Relay:
    """Passes one backend's answer on.

    Attributes:
        watch: what the stream has shown so far.
        headers: to be sent beside those that every request has.
        begun: what this backend may repeat of the request before its answer.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        client: Client,
        record: Record,
        reading: Reading,
    ):
        self.watch = StreamWatch()
        self.headers: dict[str, str] = {}
        self.begun = ""
        self._backend = backend
        self._name = backend.name
        self._settings = settings
        self._client = client
        self._record = record
        self._reading = reading
        self._dialect: Dialect | None = None
        self._translated = False
        self._request: dict[str, Any] = {}

    def speak(self, dialect: Dialect, request: dict[str, Any], *, translated: bool) -> None:
        """The API that the request was made in, and whether the answer has to be put into it."""
        self._dialect, self._request, self._translated = dialect, request, translated

    async def run(self, path: str, body: bytes) -> None:
        """Answers the client.

        Raises:
            Failure: the backend failed; `client.answered` tells whether it is too late for another.
        """
        record, answer = self._record, None
        limit = self._settings.router_answer_seconds
        if record.stream:
            prefill = (record.estimate or 0) / _PREFILL_TOKENS_PER_SECOND
            limit = self._settings.router_first_token_seconds + prefill
        try:
            give_up = partial(self._backend.probe.give_up_reason, time.monotonic())
            send = self._backend.address.send
            answer = await send("POST", path, body, _HEADERS | self.headers, limit, give_up)
            if answer.status != 200:
                raise await self._refusal(answer)
            if record.stream:
                await self._stream(answer, await self._first_event(answer, limit))
            else:
                await self._body(answer, limit)
        except UpstreamError as error:
            kind, status = error.kind, _STATUSES.get(error.kind, 502)
            if kind == "timeout" and record.first_token is not None:
                kind = "stalled"
            raise failures.broken(kind, f"{self._name}: {error}", status) from None
        finally:
            if answer:
                answer.close()

    async def _refusal(self, answer: Response) -> Failure:
        body = bytearray()
        while len(body) < _LARGEST_ERROR and (chunk := await answer.read(_REFUSAL_SECONDS)):
            body += chunk
        return failures.refusal(self._name, answer.status, answer.headers, bytes(body))

    # Streams.

    async def _first_event(self, answer: Response, limit: float) -> bytes:
        """Bytes up to the first event with data. Comments only show that the backend is at work."""
        kind = answer.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            message = f"{self._name} answered with {kind or 'no content type'}, not with a stream"
            raise failures.broken("garbled", message)
        ready = bytearray()
        while not self.watch.started:
            chunk = await answer.read(limit)
            if not chunk:
                message = f"{self._name} ended its stream before the first token"
                raise failures.broken("unfinished", message)
            self._backend.probe.answered()  # a comment shows life, too
            ready += self.watch.feed(chunk)
        self._check_error()
        if self.watch.done and not self.watch.whole:
            raise failures.broken("unfinished", f"{self._name} ended its stream without an answer")
        return bytes(ready)

    async def _stream(self, answer: Response, ready: bytes) -> None:
        client, watch, gap = self._client, self.watch, self._settings.router_stall_seconds
        await client.stop_pings()
        await client.start_stream((*_kept(answer), *self._record.headers()))
        self._record.status = 200
        self._backend.load.has_read(self._reading)
        self._record.mark_first_token()
        translated = client.stream if self._translated else None
        change = translated.feed if translated else ChatRepair().feed
        if self.begun:
            change = _one_after_the_other(Unrepeated(self.begun).feed, change)
        ready = change(ready)
        while not watch.done and watch.error is None:
            if ready:
                await client.send(ready)
            ready = b""
            chunk = await answer.read(gap)
            if not chunk:
                break
            self._backend.probe.answered()
            ready = change(watch.feed(chunk))
        if not watch.whole:
            if ready:
                await client.send(ready)
            self._check_error()
            message = f"{self._name} ended its stream without a finish reason"
            raise failures.broken("unfinished", message)
        self._take_usage(watch.usage, watch.events)
        ready += translated.end() if translated else b""
        self._keep(translated.final if translated else watch.answer)
        await client.finish(ready)
        await _drain(answer)

    def _check_error(self) -> None:
        if self.watch.error is not None:
            raise failures.from_error_event(self._name, self.watch.error)

    # Answers in one piece.

    async def _body(self, answer: Response, limit: float) -> None:
        client, body, ended = self._client, bytearray(), False
        while len(body) <= _LARGEST_HELD and not ended:
            chunk = await answer.read(limit)
            self._backend.probe.answered()
            body += chunk
            ended = not chunk
        whole = self._checked(bytes(body)) if ended else bytes(body)
        self._record.status = 200
        self._backend.load.has_read(self._reading)
        self._record.mark_first_token()
        headers = (*_kept(answer), *self._record.headers())
        if ended:
            return await client.json(200, whole, headers)
        await client.start(200, ((b"content-type", b"application/json"), *headers))
        await client.send(whole)
        while chunk := await answer.read(self._settings.router_stall_seconds):
            await client.send(chunk)
        await client.finish()

    def _checked(self, body: bytes) -> bytes:
        """A whole body, translated if need be.

        Raises:
            Failure: it is no answer.
        """
        try:
            value = orjson.loads(body)
            if value.get("error"):
                raise failures.from_error_event(self._name, value["error"])
            self._take_usage(value.get("usage"), None)
            if self.begun:
                Unrepeated(self.begun).whole(value)
                body = orjson.dumps(value)
            if self._dialect and self._translated:
                value = self._dialect.from_chat(value, self._request)
                body = orjson.dumps(value)
            elif repair_whole(value):
                body = orjson.dumps(value)
            self._keep(value)
        except (ValueError, TypeError, AttributeError, LookupError):
            message = f"{self._name} answered with something that is no JSON answer"
            raise failures.broken("garbled", message) from None
        return body

    def _keep(self, answer: dict[str, Any] | None) -> None:
        """For requests that refer to it; before the client can send one."""
        if self._dialect and answer:
            self._dialect.keep(self._request, answer)

    def _take_usage(self, usage: object, events: int | None) -> None:
        usage = usage if isinstance(usage, dict) else {}
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        output = usage.get("completion_tokens", usage.get("output_tokens"))
        self._record.prompt_tokens = prompt if isinstance(prompt, int) else None
        self._record.cached_tokens = _cached(usage)
        self._record.output_tokens = output if isinstance(output, int) else events


def _cached(usage: dict[str, Any]) -> int | None:
    """In the words of chat, Responses or Messages."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    cached = usage.get("cache_read_input_tokens") if cached is None else cached
    return cached if isinstance(cached, int) else None


def _one_after_the_other(first: Change, second: Change) -> Change:
    return lambda data: second(first(data))


def _kept(answer: Response) -> list[tuple[bytes, bytes]]:
    found = {name: answer.headers[name] for name in _KEPT_HEADERS if name in answer.headers}
    return encode(found)


async def _drain(answer: Response) -> None:
    """Reads to the end, so that the connection can be used again. Nothing follows `[DONE]`."""
    with contextlib.suppress(UpstreamError):
        while await answer.read(_DRAIN_SECONDS):
            pass
