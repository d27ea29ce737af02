"""What a backend has to do for us, how fast it reads, and whether it fails."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tqstack.router.backends.breaker import Breaker

_UNMEASURED = 1000.0  # tokens a second, until it is measured
_LEAST_MEASURED = 200  # tokens: of a shorter prompt, other things take the time
_WEIGHT = 0.3  # of a new measurement
_LEAST_KEPT = 0.2  # a backend that keeps less is taken to keep nothing
_SHARE = 0.25  # how much each running answer slows the reading of a prompt down


@dataclass(eq=False)
class Reading:
    """A prompt that a backend is reading: from its being sent to its first token.

    Attributes:
        tokens: those that it has not read before, as far as is known.
        alone: no other prompt of ours is in its way.
        seconds: that it took, once the first token has come.
    """

    tokens: int
    alone: bool
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None


class Load:
    """
    Attributes:
        running: requests of ours, each in a slot that `Slots` gave it.
        at_once: the most of them; `None`: any number.
        prefill_speed: tokens a second, as measured; `None` before.
    """

    def __init__(self, at_once: int | None = None):
        self.running = 0
        self.at_once = at_once
        self.breaker = Breaker()
        self.prefill_speed: float | None = None
        self._readings: list[Reading] = []
        self._kept = 1.0  # how much of what should have been cached was, lately

    @property
    def full(self) -> bool:
        return self.at_once is not None and self.running >= self.at_once

    @property
    def sick(self) -> bool:
        """It has failed too often to be sent another request now."""
        return not self.breaker.closed and not self.breaker.admits(time.monotonic())

    def seconds(self, tokens: int) -> float:
        """Until the first token of a prompt with so many unread tokens, if it came now."""
        waiting = 0.0
        speed = self.prefill_speed or _UNMEASURED
        if self._readings:  # one after the other, since the first of them began
            unread = sum(reading.tokens for reading in self._readings)
            waiting = max(0.0, unread / speed - (time.monotonic() - self._readings[0].began))
        return waiting + tokens / speed * (1 + _SHARE * self.running)

    def warm(self, tokens: int) -> int:
        """Of so many tokens that it has read, those that it will still have, by experience."""
        return round(tokens * self._kept) if self._kept >= _LEAST_KEPT else 0

    def begin(self, tokens: int) -> Reading:
        """A request with so many unread tokens is sent."""
        reading = Reading(tokens, alone=not self._readings)
        for other in self._readings:
            other.alone = False
        self._readings.append(reading)
        self.breaker.begin()
        return reading

    def has_read(self, reading: Reading) -> None:
        """Its first token has come."""
        self._readings.remove(reading)
        reading.seconds = time.monotonic() - reading.began

    def end(self, reading: Reading) -> None:
        if reading in self._readings:
            self._readings.remove(reading)
        self.breaker.abandoned()  # nothing, if there was a verdict

    def learn_speed(self, tokens: int, seconds: float) -> None:
        """So many unread tokens of a prompt that was alone took so long."""
        if tokens >= _LEAST_MEASURED and seconds > 0:
            speed, old = tokens / seconds, self.prefill_speed
            self.prefill_speed = speed if old is None else old + _WEIGHT * (speed - old)

    def learn_cached(self, expected: int, cached: int) -> None:
        """Of so many tokens that it had read, so many were still cached."""
        self._kept += 0.5 * (min(1.0, cached / expected) - self._kept)

    def succeeded(self) -> None:
        self.breaker.succeeded()

    def failed(self) -> None:
        self.breaker.failed(time.monotonic())
