"""The two backends: what they are, how they are, and what they serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from tqstack.router.breaker import Breaker
from tqstack.router.failure import Failure, too_long
from tqstack.router.ollama import LEAST, Contexts
from tqstack.router.policy import Name, State, View
from tqstack.router.upstream import Upstream, UpstreamError

log = logging.getLogger(__name__)

KEEP_SECONDS = 30.0  # how long a good probe is believed
PROBE_SECONDS = 2.0
# Pauses between probes of a backend that is not up: soon at first.
RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0)
_CHAT_ONLY = ("/v1/responses", "/v1/messages")  # sidecar, Ollama: translated by the router
# What the sidecar cannot do, unless its `/health` lists it under `capabilities`.
_SIDECAR_LACKS = frozenset({"embeddings", "images", "logprobs", "json_object", "json_schema"})
# What Ollama (0.33) refuses, and what it reads over; another server in its place may do it.
_OLLAMA_LACKS = frozenset({"tokenize", "prompts"})
_OLLAMA_IGNORES = frozenset(
    {"guided", "tool_choice", "choices", "echo", "logit_bias", "text_logprobs"}
)
_TOKENIZE = "/tokenize"  # vLLM's, and the sidecar's
_TOKENIZE_SECONDS = 10.0
_LARGEST_PROBE = 8 << 20


@dataclass(frozen=True)
class Health:
    """What the last probe showed.

    Attributes:
        models: entries of `/v1/models`; kept from an earlier probe when this one failed.
        report: the sidecar's `/health` as it came, for the status page.
        detail: why the state is what it is.
    """

    state: State = "down"
    models: tuple[dict[str, Any], ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    detail: str = "not asked yet"
    asked: bool = False


class Backend:
    """One backend: its address, health, breaker and load.

    Args:
        model: the one for requests that name none of its own.
        key: what it wants to see of us.
        hung_seconds: without a good probe or a byte for so long, it is taken for hung.
        still_seconds: at work, but without progress for so long, likewise.
    """

    def __init__(
        self,
        name: Name,
        url: str,
        upstream: Upstream,
        *,
        model: str = "",
        enabled: bool = True,
        key: str = "",
        hung_seconds: float = 10,
        still_seconds: float = 180,
    ):
        self.name: Name = name
        self.url = url
        # Our own key for our own sidecar; a client's never goes further.
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.health = Health() if enabled else Health("off", detail="switched off", asked=True)
        self.breaker = Breaker()
        self.running = 0  # requests of ours
        self._upstream = upstream
        self._model = model
        self._probe: asyncio.Task[None] | None = None
        self._probed_at = float("-inf")
        self._freshening: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()
        self._last_byte = float("-inf")
        self._hung_seconds, self._still_seconds = hung_seconds, still_seconds
        self._failing_since: float | None = None  # its probes
        self._last_step: Any = None  # the sidecar's, by its own clock
        self._moved_at = float("-inf")  # when that was seen to change
        # Paths that it answers with 404; asked again after it was away.
        self._unspoken: set[str] = set(_CHAT_ONLY) if name == "sidecar" else set()
        self._views: dict[tuple[State, bool], View] = {}
        self._contexts = Contexts(self._fetch) if name == "ollama" else None

    def speaks(self, path: str) -> bool:
        """Whether it takes this path itself, as far as is known.

        Ollama takes them all, but drops namespaces of tools, fails on custom ones, and reads over
        tool_choice and forms in Messages: what is translated here loses less.
        """
        return path not in self._unspoken and not (path in _CHAT_ONLY and self.is_ollama)

    def does_not_speak(self, path: str) -> None:
        self._unspoken.add(path)

    @property
    def is_ollama(self) -> bool:
        """Whether it is an Ollama, and no other server in its place, as far as is known."""
        return self._contexts is not None and self._contexts.is_ollama

    @property
    def enabled(self) -> bool:
        return self.health.state != "off"

    def view(self) -> View:
        state = self.health.state
        if state == "up" and not self.breaker.admits(time.monotonic()):
            state = "sick"
        key = (state, self._busy)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._make_view(*key)
        return view

    def _make_view(self, state: State, busy: bool) -> View:
        models = {entry["id"]: _context(entry) for entry in self.health.models}
        own = self._model or next(iter(models), "")
        facts = self.health.report.get("model")
        if isinstance(facts, dict) and isinstance(facts.get("context_length"), int):
            models[own] = facts["context_length"]
        lacks = ignores = frozenset()
        if self.name == "sidecar":
            lacks = _SIDECAR_LACKS - set(self.health.report.get("capabilities") or ())
        elif self.is_ollama:
            lacks, ignores = _OLLAMA_LACKS, _OLLAMA_IGNORES
        return View(self.name, state, models, own, busy, lacks, ignores, cuts=self.is_ollama)

    @property
    def architecture(self) -> str | None:
        facts = self.health.report.get("model")
        return facts.get("architecture") if isinstance(facts, dict) else None

    @property
    def _busy(self) -> bool:
        load = self.health.report.get("requests")
        elsewhere = load.get("running", 0) if isinstance(load, dict) else 0
        return bool(self.running or elsewhere)

    async def check_context(self, model: str, tokens: float, seconds: float) -> None:
        """Makes sure that it holds so many tokens, where only loading the model can tell.

        Raises:
            Failure: it does not.
        """
        if tokens < LEAST or not (self._contexts and self._contexts.unknown(model)):
            return
        with contextlib.suppress(UpstreamError):  # the request itself will tell
            await self._contexts.load(model, seconds)
        await self.check()
        context = self.view().context(model)
        if context is not None and tokens >= context:
            raise too_long(self.name, model, context)

    async def count_tokens(self, chat: dict[str, Any]) -> int | None:
        """Tokens of a chat's prompt by the model's own template, if this backend tells."""
        if self.health.state != "up" or not self.speaks(_TOKENIZE):
            return None
        try:
            _, answer = await self._fetch(_TOKENIZE, orjson.dumps(chat), _TOKENIZE_SECONDS)
        except UpstreamError:
            return None
        except ValueError:
            answer = {}
        count = answer.get("count")
        if not isinstance(count, int):
            self.does_not_speak(_TOKENIZE)
            return None
        return count

    def report(self) -> dict[str, Any]:
        """What `/health` and the status page tell of this backend."""
        view = self.view()
        return {
            "state": view.state,
            "detail": self.health.detail,
            "url": self.url,
            "model": view.own_model,
            "models": len(view.models),
            "context_length": view.context(view.own_model),
            "running": self.running,
            "health": self.health.report,
        }

    # What real requests showed.

    def answered(self) -> None:
        """A byte of an answer came: whatever a probe says, this backend lives."""
        self._last_byte = time.monotonic()

    def begin(self) -> None:
        self.running += 1
        self.breaker.begin()

    def end(self) -> None:
        self.running -= 1
        self.breaker.abandoned()  # nothing, if there was a verdict

    def succeeded(self) -> None:
        self.answered()
        self.breaker.succeeded()

    def failed(self, failure: Failure) -> None:
        """Counts a failure, if it was this backend's, and has it probed at once."""
        if not failure.sick:
            return
        self.breaker.failed(time.monotonic())
        if failure.kind == "refused":
            self._set(replace(self.health, state="down", detail="refuses connections"))
        self._doubt.set()

    def hopeless(self, since: float) -> str | None:
        """Why a request waits in vain that was sent at `since`, if it does.

        Waiting alone is no reason: an answer in one piece takes as long as it takes. Asked again
        and again while a request waits; meanwhile the backend is probed.
        """
        self.freshen(PROBE_SECONDS)
        now, alive = time.monotonic(), max(since, self._last_byte)
        failing = self._failing_since
        if failing is not None and now - max(failing, alive) > self._hung_seconds:
            return f"it has not answered for {self._hung_seconds:g} s, nor its probes"
        if self._last_step and now - max(self._moved_at, alive) > self._still_seconds:
            return f"it is at work, and has made no progress for {self._still_seconds:g} s"
        return None

    # Probes.

    async def watch(self) -> None:
        """Probes for ever: every 30 s while all is well, at once after a failure."""
        misses = 0
        while self.enabled:
            await self.check()
            up = self.health.state == "up"
            misses = 0 if up else misses + 1
            pause = KEEP_SECONDS if up else RETRY_SECONDS[min(misses, len(RETRY_SECONDS)) - 1]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._doubt.wait()
                    # A burst of failures is one doubt.
                    await asyncio.sleep(RETRY_SECONDS[0])
            self._doubt.clear()

    async def check(self) -> None:
        """Probes now, or joins the probe that is under way."""
        if not self.enabled:
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._check())
        await asyncio.shield(self._probe)

    def freshen(self, seconds: float) -> None:
        """Probes behind the scenes, if the last probe is older than this: somebody is looking."""
        if self.enabled and time.monotonic() - self._probed_at > seconds:
            self._probed_at = time.monotonic()
            self._freshening = asyncio.create_task(self.check())

    async def _check(self) -> None:
        began = self._probed_at = time.monotonic()
        answered = False
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                health = await self._ask()
            answered = health.state != "down"
        except TimeoutError:
            health = replace(self.health, state="down", detail="does not answer its probes")
            if time.monotonic() - self._last_byte < KEEP_SECONDS:
                health = self.health  # too busy for a probe, but its answers come
        except (UpstreamError, ValueError, TypeError) as error:
            health = replace(self.health, state="down", detail=str(error))
        self._failing_since = None if answered else self._failing_since or began
        self._set(replace(health, asked=True))

    async def _ask(self) -> Health:
        report: dict[str, Any] = {}
        if self.name == "sidecar":
            status, report = await self._get("/health")
            self._see_progress(report)
            if status != 200:
                loading = report.get("status") == "loading"
                detail = str(report.get("detail") or report.get("status") or f"status {status}")
                return replace(
                    self.health,
                    state="loading" if loading else "down",
                    report=report,
                    detail=detail,
                )
        status, listing = await self._get("/v1/models")
        if status != 200:
            raise ValueError(f"/v1/models answers {status}")
        entries = listing.get("data") or []
        models = [e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)]
        if self._contexts:
            models = await self._contexts.fill_in(models)
        return Health("up", tuple(models), report, "answers its probes")

    def _see_progress(self, report: dict[str, Any]) -> None:
        """Of the sidecar's engine: its last step, while it has requests."""
        load = report.get("requests")
        step = (
            report.get("last_step_at") if isinstance(load, dict) and load.get("running") else None
        )
        if step != self._last_step:
            self._last_step, self._moved_at = step, time.monotonic()

    async def _get(self, path: str) -> tuple[int, dict[str, Any]]:
        return await self._fetch(path, b"", 2 * PROBE_SECONDS)

    async def _fetch(self, path: str, body: bytes, seconds: float) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a GET, or of a POST if there is a body."""
        method = "POST" if body else "GET"
        answer = await self._upstream.send(method, self.url + path, body, self.headers, seconds)
        try:
            data = bytearray()
            while chunk := await answer.read(seconds):
                data += chunk
                if len(data) > _LARGEST_PROBE:
                    raise ValueError(f"{path} answers more than {_LARGEST_PROBE} bytes")
        finally:
            answer.close()
        value = orjson.loads(data)
        if not isinstance(value, dict):
            raise ValueError(f"{path} answers no JSON object")
        return answer.status, value

    def _set(self, health: Health) -> None:
        if health.state != self.health.state:
            log.info("%s is %s: %s", self.name, health.state, health.detail)
            if health.state == "up" and self.health.state in ("down", "loading"):
                # A fresh process owes nothing for its predecessor, and may be a newer version.
                self.breaker.succeeded()
                if self._contexts:
                    self._unspoken.clear()
            elif self._contexts and health.state == "down":
                self._contexts.restart()
        self.health = health
        self._views.clear()


def _context(entry: dict[str, Any]) -> int | None:
    """Tokens that a model can hold, by its entry in `/v1/models` (`max_model_len` is vLLM's)."""
    length = entry.get("context_length") or entry.get("max_model_len")
    return length if isinstance(length, int) else None
