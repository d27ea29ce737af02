from __future__ import annotations

from tqstack.cli.up import FIRST_DELAY, HEALTHY_SECONDS, LONGEST_DELAY, next_delay


def test_restarts_back_off_and_forget_after_a_healthy_run():
    delay, delays = FIRST_DELAY / 2, []
    for _ in range(8):
        delay = next_delay(delay, ran_seconds=0.1)
        delays.append(delay)
    assert delays[:4] == [1, 2, 4, 8] and delays[-1] == LONGEST_DELAY
    assert next_delay(LONGEST_DELAY, ran_seconds=HEALTHY_SECONDS) == FIRST_DELAY
