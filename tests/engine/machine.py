"""A simulated machine for the scheduler: memory, a clock, and what happened."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import strategies as st

from tqstack.engine.scheduler import EARNED, Admission, Scheduler, Waiter

GAP = 0.5


@dataclass
class Job:
    tokens: int  # of its prompt
    answer: int = 3  # tokens
    nbytes: int = 1
    kept: int = 0  # tokens of the prompt that need not be read
    stops: tuple[int, ...] = ()
    at: float = 0.0  # seconds, when it comes


class Chunk(NamedTuple):
    job: int
    tokens: int
    seconds: float


@dataclass
class Machine:
    """Memory, a clock, and what happened."""

    nbytes: int = 100
    running: int = 4
    waiting: int = 1_000
    pace: float = 0.001  # seconds, to read a token
    decode: float = 0.05  # seconds, a step of all sequences
    chunk: int = 2_048
    lost: frozenset[int] = frozenset()  # they fit alone, but not any more once they are to run
    clock: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self, self.running, self.waiting, GAP)
        self.jobs: list[Job] = []
        self.refused: dict[int, str] = {}
        self.held: set[int] = set()
        self.decoding: dict[int, int] = {}  # job -> tokens that it has made
        self.read: Counter[int] = Counter()  # tokens of each job's prompt
        self.chunks: list[Chunk] = []
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.cancelled: set[int] = set()
        self.decoded = 0.0  # seconds
        self.unpaid = self.most_unpaid = 0.0  # seconds that were read while others decode

    def alone(self, job: int) -> bool:
        return self.jobs[job].nbytes <= self.nbytes

    def admit(self, job: int) -> Admission | None:
        wanted, used = self.jobs[job], sum(self.jobs[j].nbytes for j in self.held)
        if job in self.lost or used + wanted.nbytes > self.nbytes:
            return None
        self.held.add(job)
        self.begun.append(job)
        return Admission(self.chunk, wanted.kept, wanted.stops)

    def submit(self, *jobs: Job) -> list[int]:
        """Numbers of these jobs."""
        numbers = list(range(len(self.jobs), len(self.jobs) + len(jobs)))
        self.jobs += jobs
        for number, job in zip(numbers, jobs, strict=True):
            if refusal := self.scheduler.submit(Waiter(number, job.tokens, job.kept)):
                self.refused[number] = refusal
        return numbers

    def cancel(self, job: int) -> None:
        self.scheduler.remove(job)
        self.held.discard(job)
        self.decoding.pop(job, None)
        self.cancelled.add(job)

    @property
    def idle(self) -> bool:
        return not self.scheduler.runs and not self.scheduler.waits

    def step(self) -> None:
        step = self.scheduler.next()
        assert step.refused or step.read or step.decode or self.idle
        assert len(self.held) == self.scheduler.runs <= self.running
        assert step.decode == bool(self.decoding)
        self.refused.update(dict.fromkeys(step.refused, "step"))
        if step.read:
            self._read(*step.read)
        if step.decode:
            self._decode()

    def _read(self, job: int, count: int) -> None:
        wanted, at = self.jobs[job], self.jobs[job].kept + self.read[job]
        assert job in self.held and job not in self.decoding and job not in self.ended
        assert 0 <= count <= min(self.chunk, wanted.tokens - at)
        assert count or at == wanted.tokens
        assert not any(at < stop < at + count for stop in wanted.stops)
        seconds = count * self.pace
        self.chunks.append(Chunk(job, count, seconds))
        self.clock += seconds
        self.unpaid = self.unpaid + seconds if self.decoding else 0.0
        self.most_unpaid = max(self.most_unpaid, self.unpaid)
        self.read[job] += count
        assert self.scheduler.was_read(job, count, seconds).read == at + count
        if at + count == wanted.tokens:
            self.decoding[job] = 0

    def _decode(self) -> None:
        self.clock += self.decode
        self.decoded += self.decode
        wanted = self.scheduler.waits + len(self.held) - len(self.decoding)
        reads = min(wanted, self.running - len(self.decoding))
        paid = EARNED * max(1, reads / len(self.decoding)) * self.decode
        self.unpaid = max(0.0, self.unpaid - paid)
        self.scheduler.decoded(self.decode)
        for job in list(self.decoding):
            self.decoding[job] += 1
            if self.decoding[job] >= self.jobs[job].answer:
                del self.decoding[job]
                self.scheduler.remove(job)
                self.held.remove(job)
                self.ended.append(job)

    def run(self, jobs: list[Job]) -> None:
        """Until all that come have ended."""
        coming = sorted(jobs, key=lambda job: job.at)
        while coming or not self.idle:
            if self.idle:
                self.clock = max(self.clock, coming[0].at)
            while coming and coming[0].at <= self.clock:
                self.submit(coming.pop(0))
            self.step()

    def until(self, done) -> None:
        while not done():
            self.step()

    def step_in_a_crowd(self, job: Job) -> None:
        """A step while there are always more of these jobs."""
        while self.scheduler.waits < 3:
            self.submit(job)
        self.step()

    def read_until_decoding(self, job: int) -> None:
        self.until(lambda: job in self.decoding)


@st.composite
def jobs(draw):
    tokens = draw(st.integers(0, 60) | st.integers(0, 9_000))
    return Job(
        tokens,
        draw(st.integers(1, 30)),
        draw(st.integers(1, 110)),
        draw(st.just(0) | st.integers(0, tokens) | st.just(tokens)),
        tuple(sorted(draw(st.sets(st.integers(0, tokens), max_size=3)))),
        draw(st.floats(0, 20)),
    )


machines = st.builds(
    Machine,
    running=st.integers(1, 6),
    waiting=st.integers(1, 20),
    pace=st.sampled_from([0.0, 1e-5, 1e-3, 0.04]),
    decode=st.sampled_from([0.001, 0.05, 0.9]),
    chunk=st.sampled_from([32, 64, 256, 2_048]),
    lost=st.frozensets(st.integers(0, 20), max_size=3),
)
