"""kill -9 of either backend under 32 concurrent streams, with two real model servers."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import openai
import pytest

from processes import clean_environment, free_port, running, wait_for, wait_until
from whole_stack import Stack, backend_is_up

STREAMS = 32


@dataclass
class Stream:
    """What one client saw."""

    backend: str = ""
    fallback_from: str = ""
    texts: list[str] = field(default_factory=list)
    finish: str | None = None
    failed: bool = False


@pytest.fixture
def pair(tmp_path):
    """A router between two sidecars, one of them in Ollama's place; and their processes."""
    with ExitStack() as resources:
        ports = {name: free_port() for name in ("router", "sidecar", "ollama")}
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        processes = {}
        for name, command in (("sidecar", "sidecar"), ("ollama", "sidecar"), ("router", "router")):
            environment = clean_environment(
                tmp_path,
                ROUTER_PORT=str(ports["router"]),
                SIDECAR_PORT=str(ports["sidecar" if name == "router" else name]),
                OLLAMA_BASE_URL=urls["ollama"],
                SIDECAR_MODEL="demo",
                SIDECAR_PREFIX_CACHE_MB="0",
            )
            log = tmp_path / f"{name}.log"
            argv = ["-m", "tqstack", command]
            processes[name] = resources.enter_context(running(argv, environment, log))
            wait_for(f"{urls[name]}/health", log)
        stack = Stack(urls["router"], urls["sidecar"], urls["ollama"], processes["router"].pid)
        for name in ("sidecar", "ollama"):
            wait_until(lambda name=name: backend_is_up(stack, name), f"the router sees {name}")
        yield stack, processes


@pytest.mark.parametrize("victim, prefix", [("sidecar", "tq:"), ("ollama", "ollama:")])
def test_every_stream_without_a_byte_is_answered_by_the_other_backend(pair, victim, prefix):
    stack, processes = pair
    other = "ollama" if victim == "sidecar" else "sidecar"
    some_answered, killed = threading.Semaphore(0), threading.Event()

    def ask(i: int) -> Stream:
        seen = Stream()
        # Greedy, the embedded model repeats this line until its limit: nobody is done early.
        try:
            raw = stack.client().completions.with_raw_response.create(
                model=f"{prefix}demo",
                prompt="def main():" * (i % 4 + 1),
                max_tokens=80,
                temperature=0,
                stream=True,
            )
            seen.backend = raw.headers["x-tqstack-backend"]
            seen.fallback_from = raw.headers.get("x-tqstack-fallback-from", "")
            for chunk in raw.parse():
                seen.texts.append(chunk.choices[0].text)
                seen.finish = chunk.choices[0].finish_reason or seen.finish
                some_answered.release()
        except openai.APIError:
            seen.failed = True
        return seen

    def kill() -> None:
        some_answered.acquire()
        processes[victim].send_signal(signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(STREAMS) as pool:
        streams = list(pool.map(ask, range(STREAMS)))
    killer.join()
    assert killed.is_set()
    begun = [s for s in streams if s.backend == victim]
    saved = [s for s in streams if s.backend == other]
    # Who had a byte gets the rest or an error, never silence; who had none gets a whole answer.
    assert begun and all(s.failed or s.finish for s in begun)
    assert any(s.failed for s in begun)
    assert saved and all(s.finish and not s.failed for s in saved)
    assert all(s.fallback_from == victim for s in saved)
    assert len(begun) + len(saved) == STREAMS
