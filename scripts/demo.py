"""The whole stack once, on the embedded model: a short question, a long one, a dead backend.

Run through demo.sh. If no Ollama answers, `mlx_lm.server` with the same model stands in for it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from tqstack import demo_model
from tqstack.bench.needle import Haystack, Needle
from tqstack.cli.common import fail, with_openblas
from tqstack.settings import Settings, load_settings

LONG_TOKENS = 12_000
console = Console(width=120)


def main() -> None:
    keep = "--keep" in sys.argv[1:]
    settings = load_settings()
    environment = with_openblas(dict(os.environ))
    # The embedded model is hybrid, whose threshold is 16,000: lower it for a 12,000-token question.
    environment |= {"SIDECAR_MODEL": "demo", "PROMPT_TOKEN_THRESHOLD": "8000"}
    environment.setdefault("TQSTACK_LOG_LEVEL", "error")
    if not keep:
        environment |= {"ROUTER_PORT": str(free_port()), "SIDECAR_PORT": str(free_port())}
    with ExitStack() as stack:
        stand_in = None
        if not answers(f"{settings.ollama_base_url}/v1/models"):
            console.print("No Ollama answers: mlx_lm.server with the embedded model stands in.")
            port, path = free_port(), str(demo_model.PATH)
            # It lists the models of the hub's cache, and fails where there is no such folder.
            cache = Path(stack.enter_context(TemporaryDirectory()))
            log = cache / "log"
            server = ["mlx_lm.server", "--model", path, "--port", str(port), "--log-level", "ERROR"]
            stand_in = stack.enter_context(
                running(
                    [sys.executable, "-m", *server], environment | {"HF_HUB_CACHE": str(cache)}, log
                )
            )
            environment |= {"OLLAMA_BASE_URL": f"http://127.0.0.1:{port}", "OLLAMA_MODEL": path}
            wait_for(f"http://127.0.0.1:{port}/v1/models", log)
        os.environ.update(environment)
        settings = load_settings()
        stack.enter_context(running([sys.executable, "-m", "tqstack", "up"], environment))
        wait_for(f"{settings.sidecar_url}/health")
        wait_for(f"{settings.router_url}/health")
        tour(settings, stand_in)
        if keep:
            console.print(f"\nRunning at {settings.router_url}/v1 until Ctrl-C.")
            signal.pause()


def tour(settings: Settings, stand_in: subprocess.Popen | None) -> None:
    """Ask, and show who answered."""
    from tokenizers import Tokenizer

    # The router learns of a backend that has just started at its next probe.
    with httpx.Client(trust_env=False) as client:
        until(lambda: len(client.get(f"{settings.router_url}/v1/models").json()["data"]) > 2)
    tokenizer = Plain(Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json")))
    tokens = demo_model.held_out_tokens().tolist()
    table = Table("question", "answer", "expected", "answered by", "why", "first token", "decode")
    long = None
    for kind, length in (("short", 60), (f"{LONG_TOKENS:,} tokens", LONG_TOKENS)):
        facts = 1 if length < 100 else 4
        needle = Haystack.make(tokenizer, tokens, length, length, facts).needles[0]
        long = ask(settings, needle, kind, table)
    if stand_in is not None:
        stand_in.kill()
        stand_in.wait()
        needle = Haystack.make(tokenizer, tokens, 60, 7, 1).needles[0]
        ask(settings, needle, "short, other backend killed", table)
    console.print(table)
    if long:
        held, plain = long["cache_bytes"], long["cache_bytes_fp16"]
        console.print(
            f"Cache of the long prompt: {held / 1e6:.2f} MB for {long['cache_tokens']:,} tokens; "
            f"16 bits would take {plain / 1e6:.2f} MB ({plain / held:.2f} times as much). "
            f"Prefill: {long['prefill_tokens_per_second']:.0f} tokens/s."
        )


def ask(settings: Settings, needle: Needle, kind: str, table: Table) -> dict | None:
    """One streamed question; its row in the table, and what the sidecar measured."""
    client = OpenAI(base_url=f"{settings.router_url}/v1", api_key="local", max_retries=0)
    with console.status(f"asking: {kind}"):
        start = time.perf_counter()
        raw = client.chat.completions.with_raw_response.create(
            model="auto",
            messages=needle.messages,  # pyright: ignore[reportArgumentType]
            max_tokens=12,
            temperature=0,
            stream=True,
            timeout=900,
        )
        texts, times, measured = [], [], None
        for chunk in raw.parse():
            measured = (chunk.model_extra or {}).get("tqstack") or measured
            if chunk.choices and chunk.choices[0].delta.content:
                texts.append(chunk.choices[0].delta.content)
                times.append(time.perf_counter())
    by, why = raw.headers["x-tqstack-backend"], raw.headers["x-tqstack-reason"]
    if lost := raw.headers.get("x-tqstack-fallback-from"):
        why += f" (fallback from {lost})"
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    answer, first = "".join(texts), f"{times[0] - start:.2f} s" if times else "-"
    table.add_row(kind, answer, needle.code, by, why, first, f"{speed:.0f} tokens/s")
    return measured


class Plain:
    """A bare tokenizer with the two methods that a haystack needs."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)


class running:
    """A process that is stopped, and waited for, when the block ends."""

    def __init__(self, argv: list[str], environment: dict[str, str], log: Path | None = None):
        output = log.open("wb") if log else None
        self._process = subprocess.Popen(argv, env=environment, stdout=output, stderr=output)

    def __enter__(self) -> subprocess.Popen:
        return self._process

    def __exit__(self, *_) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def wait_for(url: str, log: Path | None = None) -> None:
    def complaint() -> str:
        said = log.read_text()[-2000:] if log else "the messages above say why"
        return f"{url} does not answer; {said}"

    until(lambda: answers(url), complaint)


def until(condition, complaint=lambda: "the router did not find its backends") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            fail(complaint(), code=1)
        time.sleep(0.2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
