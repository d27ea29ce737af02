"""What happened to each request: those that run, and the last hundred."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from tqstack.router.policy import Candidate

log = logging.getLogger(__name__)

KEPT = 100
_ids = itertools.count(1)
_WORD = re.compile(r"[\w.-]{1,64}", re.ASCII)  # of what a client wrote, what a header may hold


@dataclass(slots=True)
class Record:
    """One request. Times are in seconds; `None` where nothing is known (yet).

    Attributes:
        client: the name of its key.
        position: tells its place in the queue, while it waits for a backend.
        estimate: prompt tokens as estimated; `prompt_tokens` is what the backend counted.
        cached_tokens: those of the prompt that the backend did not have to read.
        first_token: from the request's arrival to the first byte of the answer.
        output_tokens: from the backend's usage, else the number of chunks.
        left_out: types of what the request holds and the backend does not get.
        outcome: `ok`, `refused` (by the router), `failed`, or `gone` (the client).
    """

    path: str
    client: str = ""
    id: int = field(default_factory=lambda: next(_ids))
    began_at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.perf_counter)
    model: str = ""
    stream: bool = False
    estimate: int | None = None
    chosen: Candidate | None = None
    position: Callable[[], int] | None = None
    failures: list[str] = field(default_factory=list)
    status: int = 0
    first_token: float | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    outcome: str = ""
    error: str = ""
    left_out: list[str] = field(default_factory=list)

    @property
    def backend(self) -> str | None:
        return self.chosen.backend if self.chosen else None

    @property
    def reason(self) -> str:
        """Why this backend: what chose it, and the failures that led on from there."""
        reason = self.chosen.reason if self.chosen else ""
        return "; ".join((reason, *self.failures)) if self.failures else reason

    @property
    def seconds_per_token(self) -> float | None:
        """Mean gap between a stream's tokens."""
        if not self.stream or self.seconds is None or self.first_token is None:
            return None
        gaps = (self.output_tokens or 0) - 1
        return (self.seconds - self.first_token) / gaps if gaps > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For the log and the status page. It holds no prompt, no answer and no key."""
        chosen, gap = self.chosen, self.seconds_per_token
        return {
            "id": self.id,
            "began_at": round(self.began_at, 3),
            "path": self.path,
            "client": self.client,
            "model": self.model,
            "stream": self.stream,
            "backend": self.backend,
            "answered_as": chosen.model if chosen else None,
            "reason": self.reason,
            "position": self.position() if self.position else None,
            "fallback_from": chosen.fallback_from if chosen else None,
            "estimate": self.estimate,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "first_token": _rounded(self.first_token),
            "seconds": _rounded(self.seconds or time.perf_counter() - self.began),
            "tokens_per_second": round(1 / gap, 1) if gap else None,
            "status": self.status,
            "outcome": self.outcome or "running",
            "error": self.error[:300],
            "left_out": sorted(set(self.left_out))[:20],
        }

    def mark_first_token(self) -> None:
        self.first_token = time.perf_counter() - self.began

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that tell the client who answered, and why."""
        headers = [(b"x-request-id", b"tq-%d" % self.id)]
        if self.estimate is not None:
            headers.append((b"x-tqstack-prompt-tokens", b"%d" % self.estimate))
        if self.chosen:
            headers.append((b"x-tqstack-backend", self.chosen.backend.encode()))
            headers.append((b"x-tqstack-reason", self.reason.encode()))
            if self.chosen.fallback_from:
                headers.append((b"x-tqstack-fallback-from", self.chosen.fallback_from.encode()))
        if kinds := sorted({kind for kind in self.left_out if _WORD.fullmatch(kind)}):
            headers.append((b"x-tqstack-left-out", ", ".join(kinds).encode()))
        return headers


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


class Journal:
    """Keeps the records; `listener` hears of each one that ends."""

    def __init__(self, listener: Callable[[Record], None]):
        self.running: dict[int, Record] = {}
        self.recent: deque[Record] = deque(maxlen=KEPT)
        self._listener = listener

    def begin(self, path: str, client: str) -> Record:
        record = Record(path, client)
        self.running[record.id] = record
        return record

    def end(self, record: Record) -> None:
        record.seconds = time.perf_counter() - record.began
        self.running.pop(record.id, None)
        self.recent.append(record)
        self._listener(record)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", orjson.dumps(record.as_dict()).decode())
