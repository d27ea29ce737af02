"""A rank that dies or hangs is seen, all start again, and nobody waits for ever."""

from __future__ import annotations

import io
import itertools
import signal
import threading
import time

import httpx
import psutil
import pytest
from rich.console import Console

from processes import get, wait_until
from ranks.group_of_two import two_ranks
from router.stack import Stack
from tqstack import demo_model
from tqstack.cli.top import screen

SEEN = 10.0  # seconds within which `/health` must not be 200 any more
PROMPT = [int(token) for token in demo_model.held_out_tokens()[:16_000]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with two_ranks(tmp_path_factory.mktemp("home")) as pair:
        yield pair


@pytest.fixture(scope="module")
def router(pair):
    """Before the pair, and an Ollama of a few words."""
    port = int(pair.url.rpartition(":")[2])
    with Stack(sidecar_port=port, router_ping_seconds=0.1, prompt_token_threshold=1000) as stack:
        yield stack


class Request(threading.Thread):
    """A stream through the router that is read to its end, or to its failure."""

    def __init__(self, router, model, prompt, sign):
        super().__init__(daemon=True)
        self._router, self._asked, self._sign = router, {"model": model, "prompt": prompt}, sign
        self.begun = threading.Event()
        self.lines: list[str] = []

    def run(self):
        body = {**self._asked, "max_tokens": 5000, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        url = f"{self._router.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as stream:
            for line in stream.iter_lines():
                self.lines.append(line)
                if line.startswith(self._sign):
                    self.begun.set()


CASES = list(itertools.product((0, 1), (signal.SIGKILL, signal.SIGSTOP), ("prefill", "decode")))


@pytest.mark.parametrize("rank, what, when", CASES)
def test_a_rank_that_dies_or_hangs_is_seen_and_all_start_again(pair, router, rank, what, when):
    wait_until(lambda: router.http.get("/health").json()["sidecar_available"], "it is known")
    before = [pair.rank(0), pair.rank(1)]
    asked = (
        ("demo", PROMPT, ": prefill") if when == "prefill" else ("tq:demo", PROMPT[:20], "data: ")
    )
    request = Request(router, *asked)
    request.start()
    assert request.begun.wait(60), request.lines
    before[rank].send_signal(what)
    began = time.monotonic()
    wait_until(lambda: not pair.is_up(), "it is seen", SEEN)
    request.join(SEEN + 20 - (time.monotonic() - began))
    assert not request.is_alive(), "the client hangs"
    # Another backend answers if nothing of an answer has reached the client; else that is an error.
    assert ("ollama" if when == "prefill" else '"error"') in "".join(request.lines)
    wait_until(pair.is_up, "all start again", 90)
    _, alive = psutil.wait_procs(before, timeout=5)
    assert not alive
    body = {"model": "demo", "prompt": PROMPT[:20], "max_tokens": 3}
    with pair.client() as client:
        assert client.post("/v1/completions", json=body).is_success
    assert len(pair.supervisor.children()) == 2


def test_metrics_and_top_tell_of_each_rank(pair, router):
    each = pair.health()["ranks"]["each"]
    metrics = get(f"{pair.url}/metrics")
    assert metrics is not None
    for one in each:
        labels = f'{{host="{one["host"]}",rank="{one["rank"]}"}}'
        assert f"tqstack_sidecar_rank_silent_seconds{labels}" in metrics.text
        assert f"tqstack_sidecar_rank_bytes{labels}" in metrics.text
    router.probe()
    text = io.StringIO()
    Console(width=160, file=text).print(screen(router.http.get("/status").json(), rows=5))
    assert text.getvalue().count(" s ago") == 2


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
