"""Orders as plain data, and the checksum of what came of them.

["jobs", [job, ...]]   take in jobs of one prompt
["cancel", id]         take a job off
["step"], ["rest"]     do what the scheduler says; do something useful
["word", value]        in the middle of an order: what rank 0 sees, where ranks may differ
["fail", message]      all jobs fail
["close"]              the end
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from tqstack.engine.jobs import Deliver, Event, Failed, Job, Removed, Token
from tqstack.engine.worker import Worker

_JOB = TypeAdapter(Job)


class OutOfStepError(RuntimeError):
    """A rank does something else than rank 0: going on would give wrong numbers, or none."""


def plain(job: Job) -> dict[str, Any]:
    return _JOB.dump_python(job, mode="json")


def job_of(told: dict[str, Any]) -> Job:
    return _JOB.validate_python(told)


class Tally:
    """What a worker has given out since it was last asked."""

    def __init__(self) -> None:
        self._sum = 0

    def counted(self, job: Job, deliver: Deliver, gone: Callable[[int], Any] | None = None):
        """`deliver`, with its tokens and ends counted in; `gone` is told of a job's end."""

        def counting(event: Event) -> None:
            last = isinstance(event, Failed | Removed)
            if isinstance(event, Token):
                last = event.finish_reason is not None
                self._add(job.id, event.id, event.finish_reason)
            elif isinstance(event, Failed):
                self._add(job.id, event.error.code)
            if last and gone:
                gone(job.id)
            deliver(event)

        return counting

    def _add(self, *what: Any) -> None:
        self._sum = zlib.crc32(repr(what).encode(), self._sum)

    def checksum(self, worker: Worker) -> int:
        """Of that, and of the worker's books."""
        self._add(*worker.books())
        told, self._sum = self._sum, 0
        return told
