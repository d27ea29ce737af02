"""Drafts by look-up, and how many of them pay: pure, against the plainest way to say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqstack.engine.depth import GAIN, STALE, Chance, Prospect, StepTimes, depth
from tqstack.engine.lookup import LONGEST, SHORTEST, Lookup

few = st.lists(st.integers(0, 2), max_size=60)  # of three kinds: n-grams come again soon


def plainly(tokens, count):
    """The longest suffix that was there before, its last place, and what came behind it."""
    last = len(tokens)
    for length in range(min(LONGEST, last - 1), SHORTEST - 1, -1):
        for end in range(last - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[last - length :]:
                period = last - end
                return [tokens[end + i % period] for i in range(count)]
    return []


@given(few, st.integers(1, 6))
def test_the_longest_n_gram_that_was_before_tells_what_comes(tokens, count):
    assert Lookup(tokens, 100).guess(count) == plainly(tokens, count)


@given(few, few)
def test_tokens_that_come_later_count_as_those_that_were_there(first, later):
    lookup = Lookup(first, len(first) + 3)  # fewer than may come: it grows
    for token in later:
        lookup.append(token)
    assert lookup.guess(3) == plainly(first + later, 3)


def test_what_repeats_itself_is_drafted_beyond_its_end():
    assert Lookup([1, 2, 3] * 3, 20).guess(5) == [1, 2, 3, 1, 2]
    assert Lookup([7] * 6, 20).guess(4) == [7] * 4


def chance(rate):
    return Chance(rate, 100)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=6),
    st.lists(st.floats(0.5, 9), min_size=5, max_size=5),
)
def test_a_depth_pays_and_none_is_deeper_than_what_could_be_drafted(sequences, seconds):
    prospects = [Prospect(chance(rate), most) for rate, most in sequences]
    times = StepTimes(seconds)
    found = depth(prospects, times)
    assert 0 <= found <= max(prospect.most for prospect in prospects)
    if found:
        made = sum(w.chance.tokens(min(found, w.most)) for w in prospects) / len(prospects)
        assert made > GAIN * times.ratio(len(prospects), 1 + found)


def test_free_steps_are_used_to_the_full_and_dear_ones_not_at_all():
    free, dear = StepTimes([1.0] * 5), StepTimes([1, 9, 9, 9, 9])
    assert depth([Prospect(chance(0.9), 4)], free) == 4
    assert depth([Prospect(chance(0.9), 4)], dear) == 0
    assert depth([Prospect(chance(0.9), 4, cost=3)], free) == 0
    assert depth([Prospect(chance(0.0), 4)], free) == 0
    assert depth([], free) == 0


def test_measured_steps_count_more_than_those_of_warm_up_and_are_forgotten():
    times = StepTimes([1.0] * 5)
    for _ in range(9):
        times.observe(2, 1, 0.01)
        times.observe(2, 3, 0.04)
    assert times.ratio(2, 3) == pytest.approx(4) and times.ratio(1, 3) == 1
    for _ in range(STALE):
        times.observe(2, 1, 0.01)
    assert times.ratio(2, 3) == 1


def test_a_chance_follows_what_is_right_of_late():
    one = Chance()
    for _ in range(60):
        one.learn(True)
    assert one.rate > 0.95
    for _ in range(12):
        one.learn_all(0, 4)
    assert one.rate < 0.4
    assert Chance(0.5).tokens(2) == 1.75
