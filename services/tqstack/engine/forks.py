"""Jobs of one prompt: one of them reads it, and leaves a copy of its cache for the others.

The copy shares the prompt's blocks; what it holds beside them is promised like a job's.
"""

from __future__ import annotations

from tqstack.engine import caches
from tqstack.engine.budget import Budget
from tqstack.engine.caches import Cache
from tqstack.engine.prefix import Node


class Fork:
    """
    Args:
        jobs: their ids; the first one's names the fork.
        tokens: of the prompt that are read before its answers are drawn.
    """

    def __init__(self, jobs: list[int], tokens: int, budget: Budget):
        self._key, self._budget = -jobs[0], budget
        self._waiting = set(jobs)
        self.tokens = tokens
        self._cache: Cache | None = None

    @property
    def ready(self) -> bool:
        return self._cache is not None

    @property
    def blocks(self) -> int:
        return len(caches.blocks(self._cache)) if self._cache else 0

    def offer(self, cache: Cache, kept: set[Node]) -> None:
        """Keep a copy of a cache that holds the prompt, if others wait for it and it has room."""
        if self._waiting and not self.ready and self._budget.hold(self._key, self.tokens, kept):
            self._cache = caches.fork(cache)

    def take(self) -> Cache:
        """The prompt, for one more job."""
        assert self._cache is not None
        return caches.fork(self._cache)

    def leave(self, job: int) -> None:
        """A job has begun, or will not."""
        self._waiting.discard(job)
        if not self._waiting:
            self.drop()

    def drop(self) -> None:
        """Give the copy up; who still waits reads the prompt."""
        self._cache = None
        self._budget.release(self._key)
