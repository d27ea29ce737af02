"""What rank 0 sends and expects, with another rank that the test plays."""

from __future__ import annotations

import socket
from multiprocessing.connection import Connection
from types import SimpleNamespace

import mlx.core as mx
import pytest

from engine.jobs import answer, submit
from tqstack.engine.sampling import Sampling
from tqstack.models.runtime import load_runtime
from tqstack.ranks import control, leader
from tqstack.ranks.leader import Leader
from tqstack.ranks.pulse import Progress
from tqstack.settings import Settings


@pytest.fixture(scope="module")
def runtime():
    return load_runtime(Settings(sidecar_model="demo", sidecar_speculation="0"))


class Ended(Exception):
    pass


@pytest.fixture
def played(runtime, monkeypatch):
    """A leader, and the other end of its connection."""

    def end(why):
        raise Ended(why)

    monkeypatch.setattr(leader, "end", end)
    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    group = SimpleNamespace(
        orders=[ours], progress=Progress(), collectives=mx.distributed.init(), rank=0
    )
    with ours, theirs:
        yield Leader(group, runtime), theirs


def orders(connection):
    found = []
    while connection.poll():
        found.append(control.receive(connection))
    return found


def test_every_order_is_sent_before_it_is_carried_out_and_seeds_are_data(played):
    worker, other = played
    job, events = submit(worker, range(40, 60), 3, Sampling(temperature=1.0))
    [[order, [told]]] = orders(other)
    assert order == "jobs" and told["id"] == job.id and told["sampling"]["seed"] is not None
    while worker.busy:
        worker.step()
        first, *rest = orders(other)
        assert first == ["step"] and {one[0] for one in rest} <= {"word"}
    assert len(answer(events, 0)) == 3
    worker.cancel(job)
    assert orders(other) == [["cancel", job.id]]


def test_an_answer_that_differs_ends_the_ranks(played):
    worker, other = played
    submit(worker, range(40, 60), 3)
    control.send(other, [1, 12345])
    with pytest.raises(Ended, match="step 1"):
        worker.step()


def test_a_rank_that_is_gone_ends_the_others_at_the_next_order(played):
    worker, other = played
    other.close()
    with pytest.raises(Ended, match="rank"):
        submit(worker, range(40, 60), 3)
        worker.step()
