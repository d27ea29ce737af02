"""The side look at a stream: what may pass, and whether it is whole."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.scripted import delta
from tqstack.router.watch import StreamWatch

ONE, STOP, DONE = delta("one"), delta("", "stop"), b"data: [DONE]\n\n"
OOPS = b'data: {"error": {"message": "oh"}}\n\n'


def pass_through(stream: bytes, places: list[int]) -> tuple[bytes, StreamWatch]:
    edges = sorted({0, len(stream), *(p % (len(stream) + 1) for p in places)})
    watch = StreamWatch()
    return b"".join(watch.feed(stream[a:b]) for a, b in itertools.pairwise(edges)), watch


PLACES = st.lists(st.integers(0, 10_000))


@given(PLACES, st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_a_whole_stream_passes_byte_for_byte_however_it_is_cut(places, line_end):
    stream = b": ping\n\n" + ONE + delta('\u2028 "finish_reason":null') + STOP + DONE
    stream = stream.replace(b"\n", line_end)
    passed, watch = pass_through(stream, places)
    assert passed == stream
    assert (watch.whole, watch.done, watch.error) == (True, True, None)


@given(PLACES, st.sampled_from([b'data: {"choices": [', b"data", b": half a comm"]))
def test_half_an_event_never_passes(places, half):
    passed, watch = pass_through(ONE + half, places)
    assert passed == ONE
    assert not watch.whole


@given(PLACES, st.sampled_from([OOPS, OOPS + DONE, DONE]))
def test_what_an_error_event_must_replace_does_not_pass(places, tail):
    passed, watch = pass_through(ONE + tail, places)
    assert passed == ONE
    assert not watch.whole


@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls"])
def test_usage_and_finish_reason_are_seen(finish):
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    _, watch = pass_through(ONE + delta("", finish, usage=usage) + DONE, [])
    assert (watch.finished, watch.usage, watch.events) == (True, usage, 3)


def test_an_event_too_large_to_hold_passes_in_pieces_and_in_order():
    stream = ONE + delta("x" * 3_000_000) + STOP + DONE
    passed, watch = pass_through(stream, list(range(0, len(stream), 60_001)))
    assert passed == stream
    assert watch.whole
