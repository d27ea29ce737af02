"""What a backend has to do for us, and whether it fails at it."""

from __future__ import annotations

import time

from tqstack.router.backends.breaker import Breaker


class Load:
    """
    Attributes:
        running: requests of ours.
    """

    def __init__(self) -> None:
        self.running = 0
        self.breaker = Breaker()

    @property
    def sick(self) -> bool:
        """It has failed too often to be sent another request now."""
        return not self.breaker.admits(time.monotonic())

    def begin(self) -> None:
        self.running += 1
        self.breaker.begin()

    def end(self) -> None:
        self.running -= 1
        self.breaker.abandoned()  # nothing, if there was a verdict

    def succeeded(self) -> None:
        self.breaker.succeeded()

    def failed(self) -> None:
        self.breaker.failed(time.monotonic())
