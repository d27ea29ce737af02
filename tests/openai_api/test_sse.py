from __future__ import annotations

import itertools
import json
import time

from hypothesis import given
from hypothesis import strategies as st

from tqstack.openai_api.sse import DONE, EventParser, event


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(p % (len(data) + 1) for p in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.text()), st.lists(st.integers(0, 10_000)), st.sampled_from(["\n", "\r\n", "\r"]))
def test_events_survive_any_cut_and_any_line_end(texts, places, line_end):
    stream = b"".join(event({"text": text}) for text in texts) + b": a comment\n\n" + DONE
    stream = stream.replace(b"\n", line_end.encode())
    parser, payloads = EventParser(), []
    for piece in cut(stream, places):
        payloads += parser.feed(piece)
    assert payloads[-1] == b"[DONE]"
    assert [json.loads(p)["text"] for p in payloads[:-1]] == texts


def test_an_event_over_the_limit_is_dropped_and_the_next_one_is_read():
    parser = EventParser(limit=100)
    big = b"data: " + b"x" * 1000 + b"\n\n"
    assert parser.feed(big[:500]) == []
    assert parser.feed(big[500:] + DONE) == [b"[DONE]"]


@given(st.lists(st.integers(0, 10_000)), st.sampled_from(["\n", "\r\n", "\r"]))
def test_pending_counts_the_bytes_since_the_last_whole_event(places, line_end):
    whole = (event({"text": "a"}) + b": note\n\n").replace(b"\n", line_end.encode())
    rest = b"data: {" + line_end.encode() + b"data: more"
    parser = EventParser()
    for piece in cut(whole + rest, places):
        parser.feed(piece)
    assert parser.pending == len(rest)
    assert parser.comment == "note"


def test_a_big_line_in_tiny_pieces_takes_linear_time():
    def seconds(size: int) -> float:
        parser, began = EventParser(limit=1 << 24), time.perf_counter()
        for _ in range(size // 16):
            parser.feed(b"x" * 16)
        return time.perf_counter() - began

    seconds(1 << 16)
    # Sixteen times as much: a quadratic parser would take 256 times as long.
    assert seconds(1 << 21) < 80 * seconds(1 << 17)
