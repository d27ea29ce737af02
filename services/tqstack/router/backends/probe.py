"""How a backend is: asked now and then, and at once when there is doubt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tqstack.router.backends.address import Address
from tqstack.router.backends.ollama import Contexts
from tqstack.router.offers import State
from tqstack.router.upstream import UpstreamError

log = logging.getLogger(__name__)

KEEP_SECONDS = 30.0  # how long a good probe is believed
PROBE_SECONDS = 2.0
# Pauses between probes of a backend that is not up: soon at first.
RETRY_SECONDS = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Health:
    """What the last probe showed.

    Attributes:
        models: entries of `/v1/models`; kept from an earlier probe when this one failed.
        report: `/health` of a sidecar or of another router, as it came, for the status page.
        detail: why the state is what it is.
    """

    state: State = "down"
    models: tuple[dict[str, Any], ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    detail: str = "not asked yet"
    asked: bool = False

    @property
    def model(self) -> dict[str, Any]:
        """What the report tells of the backend's model."""
        facts = self.report.get("model")
        return facts if isinstance(facts, dict) else {}

    @property
    def running(self) -> int:
        """Requests that the backend says it has running, ours and others."""
        load = self.report.get("requests", self.report)
        running = load.get("running") if isinstance(load, dict) else 0
        return running if isinstance(running, int) else 0


class Probe:
    """Keeps a backend's health.

    Args:
        name: the backend's, for the log.
        reports: it has a `/health` that tells its load and progress; `None`: it may have one.
        contexts: what its models hold, of an Ollama.
        changed: hears of every new health, the old one first.
        hung_seconds: without a good probe or a byte for so long, it is taken for hung.
        still_seconds: at work, but without progress for so long, likewise.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        *,
        enabled: bool,
        reports: bool | None,
        contexts: Contexts | None,
        changed: Callable[[Health, Health], None],
        hung_seconds: float,
        still_seconds: float,
    ):
        self.health = Health() if enabled else Health("off", detail="switched off", asked=True)
        self._name = name
        self._address = address
        self._reports = reports
        self._contexts = contexts
        self._changed = changed
        self._running: asyncio.Task[None] | None = None
        self._probed_at = float("-inf")
        self._freshening: asyncio.Task[None] | None = None
        self._doubt = asyncio.Event()
        self._last_byte = float("-inf")
        self._hung_seconds, self._still_seconds = hung_seconds, still_seconds
        self._failing_since: float | None = None  # its probes
        self._last_step: Any = None  # the sidecar's, by its own clock
        self._moved_at = float("-inf")  # when that was seen to change

    @property
    def enabled(self) -> bool:
        return self.health.state != "off"

    # What real requests showed.

    def answered(self) -> None:
        """A byte of an answer came: whatever a probe says, this backend lives."""
        self._last_byte = time.monotonic()

    def doubt(self) -> None:
        """A request failed: look at once."""
        self._doubt.set()

    def refuses(self) -> None:
        """Nobody listens there."""
        self._set(replace(self.health, state="down", detail="refuses connections"))

    def give_up_reason(self, since: float) -> str | None:
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

    # Looking.

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
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._check())
        await asyncio.shield(self._running)

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
        if self._reports:
            status, report = await self._address.fetch("/health")
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
        elif self._reports is None:
            with contextlib.suppress(ValueError):  # it is answered with something else
                status, found = await self._address.fetch("/health")
                report = found if status in (200, 503) else {}
            if is_router(report) and report.get("status") != "ok":
                detail = "a router, and none of its backends can answer"
                return replace(self.health, state="down", report=report, detail=detail)
        status, listing = await self._address.fetch("/v1/models")
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

    def _set(self, health: Health) -> None:
        before, self.health = self.health, health
        if health.state != before.state:
            log.info("%s is %s: %s", self._name, health.state, health.detail)
        self._changed(before, health)


def is_router(report: dict[str, Any]) -> bool:
    """Whether this is the `/health` of a router like this one."""
    return isinstance(report.get("id"), str) and isinstance(report.get("backends"), dict)
