"""Control connections: only who knows the key comes in, and orders arrive as they were sent."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqstack.engine.grammar import Grammar
from tqstack.engine.jobs import Job
from tqstack.engine.sampling import Sampling
from tqstack.ranks import control
from tqstack.ranks.control import ORDERS, PULSE, UnreachableError
from tqstack.ranks.orders import job_of, plain

KEY = bytes(range(32))


def gathering(listener, seconds=20.0):
    found = {}
    thread = threading.Thread(
        target=lambda: found.update(control.gather(listener, KEY, 2, seconds)), daemon=True
    )
    thread.start()
    return thread, found


def test_both_ends_prove_that_they_know_the_key():
    listener = control.listen("127.0.0.1")
    address = listener.getsockname()
    thread, found = gathering(listener)
    with pytest.raises(UnreachableError, match="key"):
        control.reach(address, b"another", {"rank": 1, "purpose": ORDERS}, 0)
    ours = [
        control.reach(address, KEY, {"rank": 1, "purpose": purpose}, 5)
        for purpose in (ORDERS, PULSE)
    ]
    thread.join(20)
    assert set(found) == {(1, ORDERS), (1, PULSE)}
    control.send(found[1, ORDERS][0], ["word", 0.1])
    assert control.receive(ours[0]) == ["word", 0.1]


def test_who_says_nothing_holds_up_nobody():
    listener = control.listen("127.0.0.1")
    address = listener.getsockname()
    with socket.create_connection(address):
        thread, found = gathering(listener)
        kept = [
            control.reach(address, KEY, {"rank": 1, "purpose": purpose}, 5)
            for purpose in (ORDERS, PULSE)
        ]
        thread.join(20)
    assert len(found) == len(kept)


def test_ranks_that_do_not_come_are_named():
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"ranks \[1, 2\]"):
        control.gather(control.listen("127.0.0.1"), KEY, 3, 0.2)
    assert time.monotonic() - began < 10


numbers = st.floats(0, 2, allow_nan=False)
samplings = st.builds(
    Sampling,
    temperature=numbers,
    top_p=numbers,
    seed=st.none() | st.integers(0, 2**64 - 1),
    repetition_penalty=st.none() | numbers,
    logit_bias=st.lists(st.tuples(st.integers(0, 9), numbers), max_size=3).map(tuple),
)
grammars = st.builds(
    Grammar,
    kind=st.sampled_from(["json", "regex", "lark"]),
    text=st.text(),
    after=st.lists(st.integers(0, 99), max_size=3).map(tuple),
)
jobs = st.builds(
    Job,
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=20),
    max_tokens=st.integers(1, 99),
    sampling=samplings,
    boundaries=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    stop_tokens=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    grammar=st.none() | grammars,
)


@given(jobs)
def test_a_job_is_the_same_behind_the_wire(job):
    a, b = socket.socketpair()
    here, there = control.Connection(a.detach()), control.Connection(b.detach())
    control.send(here, plain(job))
    found = job_of(control.receive(there))
    assert vars(found) == vars(job)
    here.close()
    there.close()
