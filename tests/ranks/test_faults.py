"""A rank that dies or hangs is seen, all start again, and nobody waits for ever."""

from __future__ import annotations

import signal
import threading
import time

import httpx
import psutil
import pytest

from processes import wait_until
from ranks.group_of_two import two_ranks
from tqstack import demo_model

SEEN = 10.0  # seconds within which `/health` must not be 200 any more
PROMPT = [int(token) for token in demo_model.held_out_tokens()[:16_000]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with two_ranks(tmp_path_factory.mktemp("home")) as pair:
        yield pair


class Request(threading.Thread):
    """A stream that is read to its end, or to its failure."""

    def __init__(self, pair, prompt, sign):
        super().__init__(daemon=True)
        self._pair, self._prompt, self._sign = pair, prompt, sign
        self.begun = threading.Event()

    def run(self):
        body = {"model": "demo", "prompt": self._prompt, "max_tokens": 5000, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        try:
            with (
                self._pair.client() as client,
                client.stream("POST", "/v1/completions", json=body) as stream,
            ):
                for line in stream.iter_lines():
                    if line.startswith(self._sign):
                        self.begun.set()
        except httpx.HTTPError:
            pass


CASES = [
    (1, signal.SIGKILL, "decode"),
    (1, signal.SIGSTOP, "prefill"),
    (0, signal.SIGKILL, "prefill"),
    (0, signal.SIGSTOP, "decode"),
]


@pytest.mark.parametrize("rank, what, when", CASES)
def test_a_rank_that_dies_or_hangs_is_seen_and_all_start_again(pair, rank, what, when):
    before = [pair.rank(0), pair.rank(1)]
    prompt, sign = (PROMPT, ": prefill") if when == "prefill" else (PROMPT[:20], "data: ")
    request = Request(pair, prompt, sign)
    request.start()
    assert request.begun.wait(60)
    before[rank].send_signal(what)
    began = time.monotonic()
    wait_until(lambda: not pair.is_up(), "it is seen", SEEN)
    request.join(SEEN + 20 - (time.monotonic() - began))
    assert not request.is_alive(), "the client hangs"
    wait_until(pair.is_up, "all start again", 90)
    _, alive = psutil.wait_procs(before, timeout=5)
    assert not alive
    body = {"model": "demo", "prompt": PROMPT[:20], "max_tokens": 3}
    with pair.client() as client:
        assert client.post("/v1/completions", json=body).is_success
    assert len(pair.supervisor.children()) == 2


def test_without_their_supervisor_ranks_end(tmp_path):
    with two_ranks(tmp_path) as pair:
        ranks = pair.supervisor.children()
        pair.supervisor.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=20)
        assert len(gone) == 2 and not alive


def test_a_stop_is_clean(tmp_path):
    with two_ranks(tmp_path) as pair:
        ranks = pair.supervisor.children()
        pair.supervisor.terminate()
        assert pair.supervisor.wait(30) == 0
        assert not psutil.wait_procs(ranks, timeout=5)[1]
    log = pair.log.read_text()
    assert "ERROR" not in log and "Traceback" not in log
