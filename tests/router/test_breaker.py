from __future__ import annotations

from tqstack.router.backends.breaker import Breaker


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker(limit=3, pause=1.0, longest_pause=4.0)
    for _ in range(3):
        breaker.failed(at)
    return breaker


def test_it_opens_after_three_failures_in_a_row_only():
    breaker = Breaker(limit=3)
    for _ in range(5):
        breaker.failed(0)
        breaker.failed(0)
        breaker.succeeded()
    assert breaker.admits(0)
    assert not opened().admits(0)


def test_after_a_pause_one_trial_at_a_time_is_let_through():
    breaker = opened()
    assert not breaker.admits(0.9)
    assert breaker.admits(1.0)
    breaker.begin()
    assert not breaker.admits(1.1)
    breaker.succeeded()
    assert breaker.admits(1.1)
    assert breaker.closed


def test_a_failed_trial_doubles_the_pause_up_to_the_longest():
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(4):
        pauses.append(breaker.retry_in(now))
        now += pauses[-1]
        assert breaker.admits(now)
        breaker.begin()
        breaker.failed(now)
    assert pauses == [1, 2, 4, 4]


def test_a_trial_without_a_verdict_makes_room_for_another():
    breaker = opened()
    breaker.begin()
    breaker.abandoned()
    assert breaker.admits(1.0)
