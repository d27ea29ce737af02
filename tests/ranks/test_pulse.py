"""When a rank is taken for dead or hung: pure, with a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqstack.ranks.pulse import (
    FIRST_STEP,
    FIRST_STEPS,
    SILENCE,
    STEP,
    TIMES,
    Peers,
    Progress,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(progress, clock, seconds):
    with progress.working():
        clock.now += seconds


@given(st.lists(st.floats(0.1, SILENCE / 2), max_size=60), st.floats(0, SILENCE / 2))
def test_whoever_is_heard_of_in_time_is_alive(gaps, late):
    peers, now = Peers([1, 2], 0.0), 0.0
    for gap in gaps:
        now += gap
        peers.heard(1, {}, now)
        peers.heard(2, {}, now)
        assert peers.silent(now + late) is None


@given(st.floats(0.1, SILENCE / 2))
def test_who_is_silent_is_seen_however_often_the_others_speak(beat):
    peers, now = Peers([1, 2], 0.0), 0.0
    peers.heard(1, {}, now)
    while peers.silent(now) is None:
        assert now <= SILENCE + beat
        now += beat
        peers.heard(2, {}, now)
    assert peers.silent(now) == 1 and now > SILENCE


def test_a_watcher_that_slept_itself_listens_anew():
    peers = Peers([1], 0.0)
    peers.heard(1, {}, 0.0)
    assert peers.silent(1000.0) is None
    for beat in range(1, 13):
        peers.silent(1000.0 + beat * SILENCE / 12)
    assert peers.silent(1001.0 + SILENCE) == 1


def test_the_first_steps_may_compile_and_later_ones_may_not_take_long():
    clock = Clock()
    progress = Progress(clock)
    for _ in range(FIRST_STEPS):
        assert progress.limit == FIRST_STEP
        step(progress, clock, 0.1)
    with progress.working():
        clock.now += 5
        assert (progress.age, progress.limit) == (5, STEP)
    step(progress, clock, 0.1)
    assert progress.limit == TIMES * 5
    assert progress.age == 0


@pytest.mark.parametrize("seconds", [0.01, 1.0])
def test_a_hung_step_is_seen_within_ten_seconds_where_steps_take_a_second(seconds):
    clock = Clock()
    progress = Progress(clock)
    for _ in range(100):
        step(progress, clock, seconds)
    with progress.working():
        clock.now += 9
        assert progress.age > progress.limit
