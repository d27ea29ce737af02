"""Whether ranks live and get on: judged outside the collectives, which may hang for ever.

Every rank's watcher tells the others twice a second how far it is. A rank ends at once if a peer's
connection ends or says nothing for long, or if its own step takes far longer than steps do here: a
collective whose other end is gone. Then all ranks end, and the supervisor starts them again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import mlx.core as mx

from tqstack.ranks import control

log = logging.getLogger(__name__)

BEAT = 0.5  # seconds between two signs of life
# Seconds without one after which a rank is taken for dead; loading may hold Python's lock for some.
SILENCE, LOADING_SILENCE = 5.0, 30.0
# Seconds that a step may take: so many, or so many times the slowest of the last ones. The first
# ones compile kernels, and nothing is known of this machine yet.
STEP, TIMES, KNOWN = 8.0, 4, 64
FIRST_STEP, FIRST_STEPS = 300.0, 16
ENDED = 75  # exit code (EX_TEMPFAIL): start the ranks again


class Progress:
    """How far the engine's thread of this rank is; written by it, read by the watcher."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=KNOWN)
        self._since: float | None = None
        self.step = 0
        self.loading = True
        self.closing = False  # connections may end now

    @contextmanager
    def working(self) -> Iterator[None]:
        """A step, in which others may be waited for."""
        self.step += 1
        self._since = began = self._clock()
        yield
        self._since = None
        self._recent.append(self._clock() - began)

    @property
    def age(self) -> float:
        """Seconds that the present step has been going on; 0: there is none."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    @property
    def limit(self) -> float:
        """Seconds that it may take."""
        if self.step <= FIRST_STEPS:
            return FIRST_STEP
        return max(STEP, TIMES * max(self._recent, default=0.0))


class Peers:
    """What was heard of the others. Pure: the clock is the caller's."""

    def __init__(self, ranks: Mapping[int, Any] | list[int], now: float):
        self._heard = dict.fromkeys(ranks, now)
        self._told: dict[int, dict[str, Any]] = {}
        self._awake = now

    def heard(self, rank: int, told: dict[str, Any], now: float) -> None:
        self._heard[rank], self._told[rank] = now, told

    def told(self, rank: int) -> dict[str, Any]:
        return self._told.get(rank, {})

    def silence(self, rank: int, now: float) -> float:
        return now - self._heard[rank]

    def silent(self, now: float, most: float = SILENCE) -> int | None:
        """A rank that has said nothing for too long. Asked at every beat: whoever slept meanwhile,
        with its machine, cannot tell, and listens anew."""
        if now - self._awake > SILENCE / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._awake = now
        return next((rank for rank in self._heard if self.silence(rank, now) > most), None)


def end(why: str) -> None:
    """End this process, whatever its other threads hang in."""
    log.error("this rank ends: %s", why)
    logging.shutdown()
    os._exit(ENDED)


class Watcher(threading.Thread):
    """
    Args:
        connections: to the ranks that this one hears of: all, of rank 0; rank 0, of the others.
    """

    def __init__(self, connections: dict[int, Connection], progress: Progress):
        super().__init__(name="watcher", daemon=True)
        self._ranks = {connection: rank for rank, connection in connections.items()}
        self._progress = progress
        self.peers = Peers(list(connections), time.monotonic())

    def run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # nobody would see what this thread is for
            if not self._progress.closing:
                end(f"its watcher failed: {error}")

    def _watch(self) -> None:
        beat = 0.0
        while not self._progress.closing:
            if (now := time.monotonic()) >= beat:
                beat = now + BEAT
                self._tell()
            self._hear(max(0.0, beat - time.monotonic()))
            self._judge()

    def beat(self) -> dict[str, Any]:
        """This rank's sign of life."""
        progress = self._progress
        return {
            "step": progress.step,
            "age": round(progress.age, 3),
            "bytes": mx.get_active_memory(),
        }

    def _tell(self) -> None:
        for connection, rank in self._ranks.items():
            self._or_end(rank, lambda c=connection: control.send(c, self.beat()))

    def _hear(self, seconds: float) -> None:
        for connection in wait(list(self._ranks), seconds):
            rank = self._ranks[connection]  # pyright: ignore[reportArgumentType]
            told = self._or_end(rank, lambda c=connection: control.receive(c))  # pyright: ignore
            if told is None:
                return
            self.peers.heard(rank, told, time.monotonic())

    def _or_end(self, rank: int, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except (EOFError, OSError) as error:
            if not self._progress.closing:
                end(f"rank {rank} is gone ({error or 'its connection ended'})")

    def _judge(self) -> None:
        progress = self._progress
        if progress.closing:
            return
        # Ranks load together: where this one is done, so are the others.
        most = LOADING_SILENCE if progress.loading else SILENCE
        if (rank := self.peers.silent(time.monotonic(), most)) is not None:
            silence = self.peers.silence(rank, time.monotonic())
            end(f"rank {rank} has given no sign of life for {silence:.0f} s")
        if (age := progress.age) > progress.limit:
            end(f"step {progress.step} has been going on for {age:.0f} s")
