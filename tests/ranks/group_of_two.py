"""A real sidecar of two ranks on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from processes import clean_environment, free_port, get, running, wait_for


@dataclass(frozen=True)
class Pair:
    url: str
    log: Path
    supervisor: psutil.Process

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def health(self) -> dict[str, Any]:
        response = get(f"{self.url}/health")
        return response.json() if response is not None else {}

    def is_up(self) -> bool:
        response = get(f"{self.url}/health")
        return response is not None and response.is_success

    def rank(self, number: int) -> psutil.Process:
        return psutil.Process(self.health()["ranks"]["each"][number]["pid"])


@contextmanager
def two_ranks(home: Path, **settings: str) -> Iterator[Pair]:
    port, log = free_port(), home / "sidecar.log"
    environment = clean_environment(
        home,
        **{
            "SIDECAR_MODEL": "demo",
            "SIDECAR_PORT": str(port),
            "SIDECAR_FREES_OLLAMA": "0",
            "SIDECAR_RANKS": "2",
            **settings,
        },
    )
    with running(["-m", "tqstack", "sidecar"], environment, log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health", log)
        yield Pair(url, log, psutil.Process(process.pid))
