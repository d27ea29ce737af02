"""A slot at a backend for each request, at once or after a wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tqstack.openai_api.errors import ApiError
from tqstack.router.backends.load import Load
from tqstack.router.queue import Queue, QueueFullError, Ticket

_RETRY_SECONDS = 5


class Slots:
    """Hands out what the backends' limits allow.

    Args:
        limit: requests that may wait.
    """

    def __init__(self, limit: int):
        self._queue: Queue[Load] = Queue(limit)
        self._granted: dict[Ticket[Load], asyncio.Future[Load]] = {}

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def take(
        self,
        loads: Sequence[Load],
        client: str,
        background: bool,
        queued: Callable[[Callable[[], int]], None],
    ) -> Load:
        """Occupies a slot at one of these, the first that has one; `Slots.free` gives it back.

        Args:
            queued: hears of a wait, and how to ask for the position in the queue.

        Raises:
            ApiError: 429, if too many wait.
        """
        # One that is free is wanted by nobody who waits, or they would have it.
        for load in loads:
            if not load.full:
                load.running += 1
                return load
        try:
            ticket = self._queue.join(client, tuple(loads), background)
        except QueueFullError:
            raise ApiError(
                429,
                f"all backends are full, and {self.waiting} requests wait already; ask again later",
                code="queue_full",
                retry_after=_RETRY_SECONDS,
            ) from None
        granted = self._granted[ticket] = asyncio.get_running_loop().create_future()
        queued(lambda: self._queue.position(ticket))
        try:
            return await granted
        except BaseException:
            if granted.done() and not granted.cancelled():
                self.free(granted.result())  # it came, and nobody is there to use it
            elif ticket in self._granted:
                self._queue.leave(ticket)
            raise
        finally:
            self._granted.pop(ticket, None)

    def free(self, load: Load) -> None:
        """Gives a slot back, and to those who wait."""
        load.running -= 1
        while served := self._queue.serve(lambda one: not one.full):
            ticket, place = served
            granted = self._granted.pop(ticket)
            if not granted.cancelled():  # or its client has just left
                place.running += 1
                granted.set_result(place)
