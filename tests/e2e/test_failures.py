"""Backends that die under real traffic."""

from __future__ import annotations

import signal
import time

import httpx
import openai
import pytest

from processes import clean_environment, free_port, running, wait_until
from whole_stack import backend_is_up, whole_stack


@pytest.fixture(scope="module")
def hurt(tmp_path_factory, other):
    home = tmp_path_factory.mktemp("hurt")
    with whole_stack(home, other, PROMPT_TOKEN_THRESHOLD="120") as stack:
        yield stack


@pytest.fixture
def mortal(hurt):
    """A stack of these tests' own, which may be hurt, with both backends: both are up again."""
    for name in ("sidecar", "ollama"):
        wait_until(lambda name=name: backend_is_up(hurt, name), f"{name} is up")
    return hurt


def test_a_killed_sidecar_is_replaced_at_once_and_comes_back(mortal, needle_of):
    needle, sidecar = needle_of(200), mortal.process_of("sidecar")
    assert mortal.ask(needle).headers["x-tqstack-backend"] == "sidecar"
    sidecar.send_signal(signal.SIGKILL)
    raw = mortal.ask(needle)
    assert raw.headers["x-tqstack-backend"] == "ollama"
    assert raw.headers["x-tqstack-fallback-from"] == "sidecar"
    assert raw.parse().choices[0].message.content == needle.code
    wait_until(lambda: backend_is_up(mortal, "sidecar"), "the sidecar is restarted", 60)
    assert mortal.process_of("sidecar").pid != sidecar.pid
    assert mortal.ask(needle).headers["x-tqstack-backend"] == "sidecar"


def test_a_sidecar_killed_in_mid_stream_ends_it_with_an_error_event(mortal, needle_of):
    # Greedy, the embedded model repeats this line until its limit.
    stream = mortal.client().completions.create(
        model="tq:demo", prompt="def main():", max_tokens=2000, temperature=0, stream=True
    )
    pieces = 0
    with pytest.raises(openai.APIError):
        for _ in stream:
            pieces += 1
            if pieces == 3:
                mortal.process_of("sidecar").send_signal(signal.SIGKILL)
    assert pieces >= 3


def test_without_the_other_backend_short_prompts_go_to_the_sidecar(tmp_path, needle_of):
    with whole_stack(tmp_path, None) as stack:
        raw = stack.ask(needle_of(60))
        assert raw.headers["x-tqstack-backend"] == "sidecar"
        assert raw.headers["x-tqstack-fallback-from"] == "ollama"


def test_a_client_that_leaves_during_prefill_frees_the_sidecar(mortal, needle_of):
    with pytest.raises(openai.APITimeoutError):
        mortal.client().with_options(timeout=1.0).chat.completions.create(
            model="tq:demo", messages=needle_of(12_000).messages, max_tokens=5
        )

    def idle():
        health = httpx.get(f"{mortal.sidecar}/health").json()
        return health["requests"]["running"] == health["requests"]["waiting"] == 0

    left = time.monotonic()
    wait_until(idle, "the sidecar forgets the request", 15)
    assert time.monotonic() - left < 15
    assert httpx.get(f"{mortal.sidecar}/health").json()["cache"]["bytes"] == 0


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"TQ_KV_BITS": "9"}, "TQ_KV_BITS='9'"),
        ({"SIDECAR_MODEL": "/no/such/model"}, "/no/such/model"),
        ({"TQ_CACHE_VERSION": "native", "TQ_KV_BITS": "3"}, "allowed: 2, 4, 8"),
        ({"TQ_NO_SUCH_THING": "1"}, "TQ_NO_SUCH_THING is not a setting"),
    ],
)
def test_a_sidecar_that_cannot_serve_says_why_and_ends(tmp_path, settings, said):
    log = tmp_path / "log"
    environment = clean_environment(tmp_path, SIDECAR_PORT=str(free_port()), **settings)
    with running(["-m", "tqstack", "sidecar"], environment, log) as process:
        assert process.wait(timeout=60) == 78
    assert said in " ".join(log.read_text().split())
