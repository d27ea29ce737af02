"""When a backend that fails requests is left alone, and when it is tried again."""

from __future__ import annotations


class Breaker:
    """Closed until `limit` failures in a row; then open; after a pause, one trial at a time.

    There is no clock inside: every call brings the time, in seconds.
    """

    def __init__(self, limit: int = 3, pause: float = 1.0, longest_pause: float = 30.0):
        self._limit = limit
        self._pause = pause
        self._longest_pause = longest_pause
        self._failures = 0
        self._openings = 0
        self._opened_at = 0.0
        self._on_trial = False

    @property
    def closed(self) -> bool:
        return self._failures < self._limit

    def retry_in(self, now: float) -> float:
        """Seconds until the next trial; 0 if it may be now."""
        if self.closed:
            return 0.0
        pause = min(self._longest_pause, self._pause * 2 ** (self._openings - 1))
        return max(0.0, self._opened_at + pause - now)

    def admits(self, now: float) -> bool:
        """Whether a request may be sent; changes nothing."""
        return self.closed or (not self._on_trial and self.retry_in(now) == 0)

    def begin(self) -> None:
        """A request is being sent. While open, it is the trial."""
        self._on_trial = not self.closed

    def succeeded(self) -> None:
        self._failures = self._openings = 0
        self._on_trial = False

    def failed(self, now: float, *, weight: int = 1) -> None:
        """A request failed. A failed trial opens again, for twice as long."""
        self._failures = min(self._failures + weight, self._limit)
        if not self.closed:
            self._openings = min(self._openings + 1, 16)
            self._opened_at = now
        self._on_trial = False

    def abandoned(self) -> None:
        """A request ended without a verdict: the client went away."""
        self._on_trial = False
