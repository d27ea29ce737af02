"""A streamed answer of any OpenAI-compatible server, and when each piece of it came."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from tqstack.bench.servers import Server
from tqstack.openai_api.sse import EventParser

_PROGRESS = re.compile(r"(\d+)/(\d+)$")  # of comments, as the sidecar and mlx_lm.server send them
_REASONING = ("reasoning_content", "reasoning")
Message = dict[str, Any]


@dataclass
class Reply:
    """One request, filled while its answer comes. Times are of `time.perf_counter`, in seconds.

    Attributes:
        arrivals: when each piece of text, reasoning or tool call came.
        message: a chat's answer as it goes into the next request.
        usage: the server's own counts; empty where it gives none.
        tokens_read, tokens_told: of the prompt, read and in all, as comments in the stream told
            last; None: they did not.
        error: what went wrong; empty: nothing.
    """

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    message: Message = field(default_factory=lambda: {"role": "assistant", "content": ""})
    usage: dict[str, Any] = field(default_factory=dict)
    tokens_read: int | None = None
    tokens_told: int | None = None
    finish_reason: str | None = None
    error: str = ""

    @property
    def first_token_s(self) -> float | None:
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def generated_tokens(self) -> int:
        """By the server's count, else pieces: nearly every server sends a piece per token."""
        return self.usage.get("completion_tokens") or len(self.arrivals)

    @property
    def prompt_tokens(self) -> int | None:
        return self.usage.get("prompt_tokens")

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that the server did not compute again; None where it does not tell."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    @property
    def decode_tps(self) -> float | None:
        """Tokens per second after the first one."""
        seconds = self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0
        return (self.generated_tokens - 1) / seconds if seconds > 0 else None

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * (later - earlier) for earlier, later in itertools.pairwise(self.arrivals)]

    def take(self, event: dict[str, Any], now: float) -> None:
        """Add one event of the stream."""
        if event.get("error"):
            self.error = _error_text(event)
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices") or ():
            came = self._take_delta(choice.get("delta") or {"content": choice.get("text")})
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            # An answer without any text has a first token too: the one that ends it.
            if came or (self.finish_reason and not self.arrivals):
                self.arrivals.append(now)

    def _take_delta(self, delta: dict[str, Any]) -> bool:
        came = False
        for name in ("content", *_REASONING):
            if text := delta.get(name):
                self.message[name] = self.message.get(name, "") + text
                came = True
        for call in delta.get("tool_calls") or ():
            self._take_call(call)
            came = True
        return came

    def _take_call(self, piece: dict[str, Any]) -> None:
        """Calls come in pieces: the name first, then the arguments' text."""
        calls: list[dict[str, Any]] = self.message.setdefault("tool_calls", [])
        index = piece.get("index", len(calls))
        while len(calls) <= index:
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[index], piece.get("function") or {}
        call["id"] = piece.get("id") or call.get("id", f"call_{index}")
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""


def http_client() -> httpx.AsyncClient:
    """One for all servers: no proxies, no limit on connections, minutes for a long prompt."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(900, connect=5)
    return httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)


async def stream(
    client: httpx.AsyncClient,
    server: Server,
    body: dict[str, Any],
    answer: Reply | None = None,
    leave: Callable[[Reply], bool] = lambda answer: False,
) -> Reply:
    """Send a request and read its stream to the end. What fails is told in `answer.error`.

    Args:
        body: a chat if it has messages, else a completion; the model and temperature 0 are added.
        answer: filled while it comes, for who wants to look on.
        leave: asked whenever something has come; True closes the connection.
    """
    answer = answer or Reply()
    path = "chat/completions" if "messages" in body else "completions"
    body = {
        "model": server.model,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    content, url = orjson.dumps(body), f"{server.url}/v1/{path}"
    headers = {"content-type": "application/json", "accept-encoding": "identity"} | server.headers
    answer.sent = time.perf_counter()
    try:
        async with client.stream("POST", url, content=content, headers=headers) as response:
            if response.is_success:
                await _read(response, answer, leave)
            else:
                answer.error = _refusal(response.status_code, await response.aread())
    except httpx.HTTPError as error:
        answer.error = str(error) or type(error).__name__
    return answer


async def _read(response: httpx.Response, answer: Reply, leave: Callable[[Reply], bool]) -> None:
    parser, done = EventParser(), False
    async for data in response.aiter_bytes():
        now = time.perf_counter()
        for payload in parser.feed(data):
            done = payload == b"[DONE]"
            if not done:
                answer.take(orjson.loads(payload), now)
        if progress := _PROGRESS.search(parser.comment):
            answer.tokens_read, answer.tokens_told = int(progress[1]), int(progress[2])
        if leave(answer):
            return
    if not done and not answer.error:
        answer.error = "the stream ended without [DONE]"


def _refusal(status: int, content: bytes) -> str:
    try:
        return f"{status}: {_error_text(orjson.loads(content))}"
    except orjson.JSONDecodeError:
        return f"{status}: {content[:200].decode(errors='replace')}"


def _error_text(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    return str(error.get("message", error) if isinstance(error, dict) else error)
