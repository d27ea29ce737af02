"""Rank 0's worker: it decides, and sends each order before it carries it out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import mlx.core as mx

from tqstack.engine.agreement import Agreement
from tqstack.engine.jobs import Deliver, Job
from tqstack.engine.worker import Worker
from tqstack.ranks import control
from tqstack.ranks.group import Group
from tqstack.ranks.orders import Tally, plain
from tqstack.ranks.pulse import end

CLOSE_SECONDS = 5  # for other ranks to write what they keep


class RanksAgreement(Agreement):
    """Of several ranks; `word` differs between rank 0 and the others."""

    many = True

    def __init__(self, group: Group, word: Callable[[Any], Any]):
        self._group, self._word = group, word

    def word(self, value: Any) -> Any:
        return self._word(value)

    def least(self, count: int) -> int:
        told = mx.distributed.all_gather(mx.array([count]), group=self._group.collectives)
        return min(told.tolist())  # pyright: ignore[reportArgumentType]

    def drawn(self, tokens: mx.array) -> mx.array:
        # Each rank's own draw stays in the graph: it may hold collectives.
        own = tokens.astype(mx.int32) * int(self._group.rank == 0)
        return mx.distributed.all_sum(own, group=self._group.collectives)

    def failed(self, error: Exception) -> None:
        end(f"a step failed: {error}")


class Leader(Worker):
    """A worker whose orders others follow. Other arguments are `Worker`'s."""

    def __init__(self, group: Group, *arguments: Any, **options: Any):
        self._group, self._tally = group, Tally()
        self._expected: list[deque[int]] = [deque() for _ in group.orders]
        super().__init__(*arguments, ranks=RanksAgreement(group, self._tell), **options)
        group.progress.loading = False

    def _order(self, *order: Any) -> None:
        for connection in self._group.orders:
            try:
                control.send(connection, order)
            except OSError as error:
                end(f"an order reaches a rank no more: {error}")

    def _tell(self, value: Any) -> Any:
        self._order("word", value)
        return value

    def submit_all(self, jobs: Sequence[tuple[Job, Deliver]]) -> None:
        seeded = [(_seeded(job), self._tally.counted(job, deliver)) for job, deliver in jobs]
        self._order("jobs", [plain(job) for job, _ in seeded])
        super().submit_all(seeded)

    def cancel(self, job: Job) -> None:
        self._order("cancel", job.id)
        super().cancel(job)

    def fail_all(self, message: str) -> None:
        self._order("fail", message)
        super().fail_all(message)

    def step(self) -> None:
        self._do("step", super().step)

    def rest(self) -> None:
        self._do("rest", super().rest)

    def _do(self, order: str, act: Callable[[], None]) -> None:
        with self._group.progress.working():
            self._order(order)
            act()
        checksum = self._tally.checksum(self)
        for expected in self._expected:
            expected.append(checksum)
        self._check()

    def _check(self) -> None:
        """Compare what others say of the orders that they have carried out."""
        for connection, expected in zip(self._group.orders, self._expected, strict=True):
            while expected and (answer := _answer(connection)):
                at = self._group.progress.step - len(expected) + 1
                if answer != [at, expected.popleft()]:
                    end(f"a rank has done something else than rank 0 in step {at}")

    def close(self) -> None:
        self._order("close")
        self._group.progress.closing = True
        super().close()
        mx.synchronize()
        for connection in self._group.orders:  # others end first, so that none misses the order
            while connection.poll(CLOSE_SECONDS) and _answer(connection):
                pass


def _answer(connection: Connection) -> list[Any] | None:
    """What a rank says, if it has said something; its end is the watcher's."""
    try:
        return control.receive(connection) if connection.poll() else None
    except (EOFError, OSError):
        return None


def _seeded(job: Job) -> Job:
    """With a seed that all ranks know, where the clock would give one."""
    if job.sampling.seed is not None:
        return job
    return replace(job, sampling=replace(job.sampling, seed=time.time_ns()))
