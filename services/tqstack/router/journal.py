"""What happened to each request: those that run, and the last hundred."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tqstack.router.policy import Decision, Name

KEPT = 100
_ids = itertools.count(1)


@dataclass(slots=True)
class Record:
    """One request. Times are in seconds; `None` where nothing is known (yet).

    Attributes:
        estimate: prompt tokens as estimated; `prompt_tokens` is what the backend counted.
        first_token: from the request's arrival to the first byte of the answer.
        output_tokens: from the backend's usage, else the number of chunks.
        outcome: `ok`, `refused` (by the router), `failed`, or `gone` (the client).
    """

    path: str
    id: int = field(default_factory=lambda: next(_ids))
    began_at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.perf_counter)
    model: str = ""
    stream: bool = False
    estimate: int | None = None
    decision: Decision | None = None
    failures: list[str] = field(default_factory=list)
    status: int = 0
    first_token: float | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    outcome: str = ""
    error: str = ""

    @property
    def backend(self) -> Name | None:
        return self.decision.backend if self.decision else None

    @property
    def reason(self) -> str:
        """Why this backend: the decision's reason, and the failures that led on from there."""
        reason = self.decision.reason if self.decision else ""
        return "; ".join((reason, *self.failures)) if self.failures else reason

    def mark_first_token(self) -> None:
        self.first_token = time.perf_counter() - self.began

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that tell the client who answered, and why."""
        headers = [(b"x-request-id", b"tq-%d" % self.id)]
        if self.estimate is not None:
            headers.append((b"x-tqstack-prompt-tokens", b"%d" % self.estimate))
        if self.decision:
            headers.append((b"x-tqstack-backend", self.decision.backend.encode()))
            headers.append((b"x-tqstack-reason", self.reason.encode()))
            if self.decision.fallback_from:
                headers.append((b"x-tqstack-fallback-from", self.decision.fallback_from.encode()))
        return headers


class Journal:
    """Keeps the records; `listener` hears of each one that ends."""

    def __init__(self, listener: Callable[[Record], None] | None = None):
        self.running: dict[int, Record] = {}
        self.recent: deque[Record] = deque(maxlen=KEPT)
        self._listener = listener

    def begin(self, path: str) -> Record:
        record = Record(path)
        self.running[record.id] = record
        return record

    def end(self, record: Record) -> None:
        record.seconds = time.perf_counter() - record.began
        self.running.pop(record.id, None)
        self.recent.append(record)
        if self._listener:
            self._listener(record)
