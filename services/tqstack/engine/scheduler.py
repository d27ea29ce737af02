"""Who runs next: pure decisions from what has come and what the last step cost. No mlx, no clock.

Prompts are read one at a time, in chunks; all sequences that are read to their end decode together.
The prompt with the fewest tokens left goes first, and one that others overtake ages: for each token
that is read for somebody else it counts a token less, and for each job that is admitted some more,
so that a long one waits for about as much work as it is itself, and no longer.

While sequences decode, reading has `gap` seconds at a time, for a long prompt's chunk or for
several short prompts; when they are used up, the sequences get half as much again, or less if more
prompts than sequences wait for theirs. Prompts that come together go on credit: one that waited
while as much was read for others as it is itself, and that is read within a gap, is read at once,
so that the batch is full before it has made many tokens. What was borrowed is paid back before
anything else is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

SMALLEST_CHUNK = 32  # a step of fewer tokens costs as much
ADMISSION = 256  # tokens by which one job more makes those age that were there before
EARNED = 2 / 3  # seconds of reading for one of decoding: a stream keeps more than half its speed
FIRST_CHUNK = 128  # beside others, before anything is known of this machine's speed
LOAN = 2  # gaps that reading may borrow


@dataclass(frozen=True)
class Admission:
    """A job that has room, and how its prompt is read.

    Attributes:
        chunk: most tokens of a chunk.
        read: tokens of the prompt that were kept from before.
        stops: positions at which a chunk must end, ascending.
    """

    chunk: int
    read: int = 0
    stops: tuple[int, ...] = ()


class Memory(Protocol):
    """Where there must be room."""

    def admit(self, job: int) -> Admission | None:
        """Promise a job all that it may need; None: there is no room beside what runs."""
        ...

    def alone(self, job: int) -> bool:
        """Whether there would be room if nothing else ran."""
        ...


@dataclass
class Waiter:
    """A job as the scheduler sees it.

    Attributes:
        tokens: of its prompt.
        read: of those, how many need not be read any more; a guess until it is admitted.
        waited: tokens that were read for others meanwhile, and what admissions count for.
        after: the job that reads the same prompt; this one waits until it is read.
    """

    job: int
    tokens: int
    read: int = 0
    waited: int = 0
    chunk: int = 0
    stops: tuple[int, ...] = ()
    after: int | None = None

    @property
    def left(self) -> int:
        """Tokens that must still be read."""
        return self.tokens - self.read

    @property
    def rank(self) -> int:
        """The lowest goes first."""
        return self.left - self.waited


@dataclass(frozen=True)
class Step:
    """What to do now.

    Attributes:
        refused: jobs that can never run; they are forgotten.
        read: (job, tokens of its next chunk), or None.
        decode: whether all sequences that are read to their end make a token.
    """

    refused: tuple[int, ...] = ()
    read: tuple[int, int] | None = None
    decode: bool = False


@dataclass
class Scheduler:
    """
    Args:
        running: most jobs that run at once.
        waiting: most jobs that wait.
        gap: seconds for which reading may hold up sequences that decode.
    """

    memory: Memory
    running: int
    waiting: int
    gap: float
    _queue: dict[int, Waiter] = field(default_factory=dict)
    _reading: dict[int, Waiter] = field(default_factory=dict)
    _decoding: dict[int, Waiter] = field(default_factory=dict)
    _blocked: set[int] = field(default_factory=set)  # had no room, and nobody has gone since
    _pace: float = 0.0  # seconds that reading a token takes; 0: unknown
    _credit: float = field(init=False)  # seconds that reading may take now
    _spent: bool = False  # whether the sequences that decode get their time now

    def __post_init__(self) -> None:
        self._credit = self.gap

    @property
    def waits(self) -> int:
        return len(self._queue)

    @property
    def runs(self) -> int:
        return len(self._reading) + len(self._decoding)

    def submit(self, waiter: Waiter) -> str | None:
        """Take a job in, or tell why not: "queue_full", "insufficient_memory"."""
        if not self.memory.alone(waiter.job):
            return "insufficient_memory"
        if len(self._queue) >= self.waiting:
            return "queue_full"
        self._queue[waiter.job] = waiter
        return None

    def remove(self, job: int) -> None:
        """A job has ended, or was cancelled."""
        for where in (self._queue, self._reading, self._decoding):
            where.pop(job, None)
        self._inherit(job)
        self._blocked.clear()
        if not self._decoding:
            self._credit, self._spent = self.gap, False

    def _inherit(self, job: int) -> None:
        """The first of those who waited for a job's prompt reads it in its place."""
        heirs = [waiter for waiter in self._queue.values() if waiter.after == job]
        for waiter in heirs:
            waiter.after = heirs[0].job if waiter is not heirs[0] else None

    def next(self) -> Step:
        refused = self._admit()
        read = None
        # What need not be read is in nobody's way.
        waiter = min(self._reading.values(), key=lambda w: (w.left > 0, w.rank), default=None)
        if waiter and (not self._spent or self._fits(waiter) or self._may_borrow(waiter)):
            read = waiter.job, self._chunk(waiter)
        return Step(refused, read, bool(self._decoding))

    def _fits(self, waiter: Waiter) -> bool:
        """Whether it takes no more of the time for reading than there is."""
        return not waiter.left or waiter.left * self._pace <= self._credit

    def _may_borrow(self, waiter: Waiter) -> bool:
        """Whether it is its turn, though the time for reading is used up: as much was read for
        others while it waited as it is itself, and it takes no longer than a gap."""
        short = 0 < waiter.left * self._pace <= self.gap
        return short and waiter.rank <= 0 and self._credit > -LOAN * self.gap

    def _admit(self) -> tuple[int, ...]:
        """Admit the job whose prompt goes first, if it is one that waits. Returns those that turn
        out not to fit at all."""
        refused: list[int] = []
        ahead = min((w.rank for w in self._reading.values()), default=None)
        for waiter in sorted(self._queue.values(), key=_rank):
            if self.runs >= self.running:
                break
            if waiter.after is not None:
                continue
            if ahead is not None and waiter.rank >= ahead and waiter.left:
                continue
            if admission := self._room(waiter.job):
                waiter.chunk, waiter.read = admission.chunk, admission.read
                waiter.stops = admission.stops
                for earlier in (*self._queue.values(), *self._reading.values()):
                    earlier.waited += ADMISSION
                self._reading[waiter.job] = self._queue.pop(waiter.job)
                break
            if not self.runs:  # nothing will make more room than there is now
                refused.append(waiter.job)
                self.remove(waiter.job)
            elif waiter.rank <= 0:  # overtaken often enough: the next room is its own
                break
        return tuple(refused)

    def _room(self, job: int) -> Admission | None:
        """Room for a job; one that had none is not tried again before somebody has gone."""
        if job in self._blocked:
            return None
        admission = self.memory.admit(job)
        if not admission:
            self._blocked.add(job)
        return admission

    def _chunk(self, waiter: Waiter) -> int:
        """Tokens of its next chunk: a full one, or what goes into the gap of those who wait."""
        most = waiter.chunk
        if self._decoding or self._queue or len(self._reading) > 1:
            whole = not self._decoding or self._may_borrow(waiter)
            seconds = self.gap if whole else self._credit
            fitting = int(seconds / self._pace) if self._pace else FIRST_CHUNK
            if waiter.left > fitting:
                most = min(most, _power_of_two(max(SMALLEST_CHUNK, fitting)))
        end = min(waiter.read + most, waiter.tokens)
        return min([end, *(stop for stop in waiter.stops if waiter.read < stop)]) - waiter.read

    # -- what steps report ---------------------------------------------------------------------

    def was_read(self, job: int, tokens: int, seconds: float) -> Waiter:
        """A chunk is done; one that reads a prompt to its end lets the job decode."""
        waiter = self._reading[job]
        waiter.read += tokens
        if tokens >= SMALLEST_CHUNK:  # fewer say little
            pace = seconds / tokens
            self._pace = (self._pace + pace) / 2 if self._pace else pace
        if self._decoding:
            self._credit -= seconds
            self._spent = self._spent or self._credit < self.gap / 4
        for other in (*self._queue.values(), *self._reading.values()):
            if other is not waiter:
                other.waited += tokens
        if not waiter.left:
            self._decoding[job] = self._reading.pop(job)
            for other in self._queue.values():
                if other.after == job:
                    other.after, other.read = None, other.tokens
        return waiter

    def decoded(self, seconds: float) -> None:
        """All sequences have made a token. Reading earns time by that, more of it if more prompts
        wait than sequences decode: every job then gets about the same share."""
        reads = min(self.waits + len(self._reading), self.running - len(self._decoding))
        share = max(1.0, reads / max(1, len(self._decoding)))
        self._credit = min(self.gap, self._credit + EARNED * share * seconds)
        self._spent = self._spent and self._credit < self.gap


def _power_of_two(n: int) -> int:
    """The last one up to n: of few sizes, few kernels are compiled."""
    return 1 << (n.bit_length() - 1)


def _rank(waiter: Waiter) -> int:
    return waiter.rank
