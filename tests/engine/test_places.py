"""Checkpoints are few, apart, and where later prompts will go on from."""

from __future__ import annotations

from itertools import pairwise
from math import log2

from hypothesis import assume, given
from hypothesis import strategies as st

from tqstack.engine.places import APART, BACK, LADDER, MERGES, places


@st.composite
def prompts(draw):
    """(tokens, ends of messages, start, known)"""
    tokens = draw(st.integers(1, 300_000) | st.integers(1, 200))
    ends = draw(st.lists(st.integers(1, tokens), max_size=30, unique=True).map(sorted))
    start = draw(st.just(0) | st.integers(0, tokens - 1) | st.sampled_from([0, *ends]))
    assume(start < tokens)
    return tokens, ends, start, draw(st.integers(start, tokens))


def covered(place, start, last, chosen):
    """Whether there is a checkpoint at a place, or so near that another one would be a waste."""
    return not start < place <= last or min(abs(place - p) for p in (start, *chosen)) < APART


@given(prompts())
def test_places_ascend_above_the_start_apart_and_before_the_last_token(prompt):
    tokens, _, start, _ = prompt
    chosen = places(*prompt)
    assert all(start + APART <= place < tokens for place in chosen)
    assert all(b - a >= APART for a, b in pairwise(chosen))


@given(prompts())
def test_a_long_prompt_has_logarithmically_few(prompt):
    tokens = prompt[0]
    doublings = sum(1 + max(0.0, log2(tokens / first)) for first in (BACK, LADDER))
    assert len(places(*prompt)) <= 4 + doublings


@given(prompts())
def test_the_last_messages_end_is_one_of_them(prompt):
    tokens, ends, start, _ = prompt
    last = max((end for end in ends if end < tokens), default=tokens - 1 - MERGES)
    assert last in places(*prompt) or last < start + APART


@given(prompts())
def test_first_and_second_last_messages_end_and_branch_are_places(prompt):
    tokens, ends, start, known = prompt
    ends, chosen = [end for end in ends if end < tokens], places(*prompt)
    for place in (*ends[:1], *ends[-2:-1], known):
        assert covered(place, start, tokens - 1, chosen)


def test_a_new_branch_and_a_new_system_prompt_are_exactly_there():
    chosen = places(20_000, [3_000, 9_000, 19_900], start=0, known=5_000)
    assert {3_000, 5_000, 9_000, 19_900} <= set(chosen)


@given(st.integers(1, 200_000), st.integers(20, 200))
def test_an_edit_costs_little_more_than_twice_what_lies_behind_it(tokens, message):
    ends, last = list(range(message, tokens, message)), tokens - 1
    chosen = places(tokens, ends, start=0, known=0)
    for edit in range(0, tokens, 1 + tokens // 100):
        goes_on = max((place for place in chosen if place <= edit), default=0)
        assert last - goes_on <= 2 * max(last - edit, BACK) + message + APART


@given(st.integers(1, 300_000), st.data())
def test_of_a_prompt_that_is_cancelled_half_is_kept(tokens, data):
    read = data.draw(st.integers(0, tokens - 1))
    kept = max((p for p in places(tokens, [], start=0, known=0) if p <= read), default=0)
    assert 2 * kept >= read - 2 * APART or read < LADDER + APART


def test_one_text_is_cut_where_more_text_may_merge():
    assert places(1_001, [], start=0, known=0) == (1_000 - MERGES,)


def test_a_prompt_that_ends_near_where_it_goes_on_from_makes_none():
    assert places(1_000, [400, 990], start=990, known=990) == ()
    assert places(1, [], start=0, known=0) == places(1, [1], start=0, known=1) == ()
