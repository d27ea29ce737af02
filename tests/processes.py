"""Real processes for tests: started on free ports, always reaped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tqstack.cli.common import with_openblas
from tqstack.settings import Settings


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def clean_environment(home: Path, **settings: str) -> dict[str, str]:
    """An environment with these settings, no others, and a HOME of its own."""
    ours = {name.upper() for name in Settings.model_fields} | {"TQSTACK_CONFIG"}
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    (home / "hub").mkdir(exist_ok=True)
    environment |= {"HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    return with_openblas(environment | settings)


def tqstack(home: Path, *arguments: str, text: str = "", **settings: str):
    """A `tqstack` command that ends by itself: its result, with what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "tqstack", *arguments],
        env=clean_environment(home, **settings),
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
    )


@contextmanager
def running(argv: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """A process of ours with its children, in a group of its own, gone when the block ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *argv],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def get(url: str, key: str = "") -> httpx.Response | None:
    try:
        return httpx.get(url, headers={"x-api-key": key}, timeout=5, trust_env=False)
    except httpx.HTTPError:
        return None


def wait_until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.1)


def wait_for(url: str, log: Path, seconds: float = 240, key: str = "") -> None:
    """Until `url` answers with success; the log's end tells why it does not."""

    def answers() -> bool:
        response = get(url, key)
        return response is not None and response.is_success

    try:
        wait_until(answers, url, seconds)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log.read_text()[-2000:]}") from None
