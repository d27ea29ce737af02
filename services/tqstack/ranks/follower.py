"""Every other rank: the same worker, on rank 0's orders."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from tqstack.engine.jobs import Event, Job
from tqstack.engine.worker import Worker
from tqstack.ranks import control
from tqstack.ranks.group import Group
from tqstack.ranks.leader import RanksAgreement
from tqstack.ranks.orders import OutOfStepError, Tally, job_of
from tqstack.ranks.pulse import end


class Follower:
    """Carries orders out until the last one. While there are none it waits in a read, at no cost.

    Attributes:
        agreement: what its worker is made with.
    """

    def __init__(self, group: Group):
        self._group, self._tally = group, Tally()
        self._jobs: dict[int, Job] = {}
        self.agreement = RanksAgreement(group, self._hear)

    def _next(self) -> list[Any]:
        return control.receive(self._group.orders[0])

    def _hear(self, value: Any) -> Any:
        order, *told = self._next()
        if order != "word":
            raise OutOfStepError(f"rank 0 orders {order!r} where this rank asks for a word")
        return told[0]

    def follow(self, worker: Worker) -> None:
        self._group.progress.loading = False
        try:
            while (order := self._next())[0] != "close":
                self._carry_out(worker, *order)
        except Exception as error:  # others may wait for this rank's part for ever
            end(f"an order could not be carried out: {error or 'rank 0 is gone'}")
        self._group.progress.closing = True
        worker.close()
        mx.synchronize()

    def _carry_out(self, worker: Worker, order: str, what: Any = None) -> None:
        progress = self._group.progress
        if order == "jobs":
            jobs = [job_of(told) for told in what]
            self._jobs |= {job.id: job for job in jobs}
            gone = lambda job: self._jobs.pop(job, None)  # noqa: E731
            worker.submit_all([(job, self._tally.counted(job, _nobody, gone)) for job in jobs])
        elif order == "cancel":
            if job := self._jobs.get(what):
                worker.cancel(job)
        elif order == "fail":
            worker.fail_all(what)
        elif order in ("step", "rest"):
            with progress.working():
                (worker.step if order == "step" else worker.rest)()
            answer = progress.step, self._tally.checksum(worker)
            control.send(self._group.orders[0], answer)
        else:
            raise OutOfStepError(f"rank 0 orders {order!r}, which this rank does not know")


def _nobody(event: Event) -> None:
    """The client is rank 0's."""
