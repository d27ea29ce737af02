"""Whose turn it is where all backends are full. Pure: no clock, no event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

Target = TypeVar("Target")
_YIELD = 8  # rounds that a background prompt stands back for others


class QueueFullError(Exception):
    """So many wait that one more would only wait in vain."""


@dataclass(eq=False)
class Ticket(Generic[Target]):
    """One that waits.

    Attributes:
        wants: the places that would do, the best first.
        turn: the lower, the earlier; see `Queue`.
    """

    client: str
    wants: tuple[Target, ...]
    turn: tuple[int, int] = (0, 0)


class Queue(Generic[Target]):
    """First come, first served among a client's own; clients take turns.

    Turns are rounds: in each, every client that waits is served once. So who sends a hundred
    requests waits for those, and everybody else for one of them. A background prompt stands some
    rounds back, and no more: it is served, too.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._round = 0  # that of the last one served
        self._rounds: dict[str, int] = {}  # each client's last, while one of its tickets waits
        self._numbers = count()
        self._waiting: list[Ticket[Target]] = []  # by turn

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket[Target]]:
        return iter(self._waiting)

    def join(self, client: str, wants: tuple[Target, ...], background: bool) -> Ticket[Target]:
        """
        Raises:
            QueueFullError: the queue is as long as it may be.
        """
        if len(self._waiting) >= self._limit:
            raise QueueFullError
        number = max(self._round, self._rounds.get(client, 0)) + 1
        if not background:  # those of a client do not stand in its own way
            self._rounds[client] = number
        turn = number + _YIELD if background else number, next(self._numbers)
        ticket = Ticket(client, wants, turn)
        self._waiting.append(ticket)
        self._waiting.sort(key=lambda one: one.turn)
        return ticket

    def leave(self, ticket: Ticket[Target]) -> None:
        self._waiting.remove(ticket)
        if not any(one.client == ticket.client for one in self._waiting):
            self._rounds.pop(ticket.client, None)

    def position(self, ticket: Ticket[Target]) -> int:
        """1 for the next one."""
        return self._waiting.index(ticket) + 1

    def serve(self, free: Callable[[Target], bool]) -> tuple[Ticket[Target], Target] | None:
        """Takes the first one out that has a free place among those it wants, if there is one."""
        for ticket in self._waiting:
            for place in ticket.wants:
                if free(place):
                    self._round = max(self._round, ticket.turn[0])
                    self.leave(ticket)
                    return ticket, place
        return None
