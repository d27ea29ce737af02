"""The whole stack as real processes: `tqstack up`, and mlx_lm.server as the other backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mlx_lm import convert
from openai import OpenAI

from processes import clean_environment, free_port, get, running, wait_for, wait_until
from tqstack import demo_model
from tqstack.bench.needle import Needle


@dataclass
class Stack:
    router: str
    sidecar: str
    other: str | None
    supervisor: int
    key: str = ""

    def client(self, url: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{url or self.router}/v1", api_key="local", max_retries=0)

    def ask(self, needle: Needle, **options: Any):
        """The router's answer to a needle's question, with its headers."""
        options = {"model": "auto", "max_tokens": 12, "temperature": 0, **options}
        chats = self.client().chat.completions.with_raw_response
        return chats.create(messages=needle.messages, **options)

    def process_of(self, name: str) -> psutil.Process:
        """The service's process, a child of the supervisor."""
        children = psutil.Process(self.supervisor).children()
        return next(child for child in children if child.cmdline()[-1] == name)


@contextmanager
def other_backend(home: Path) -> Iterator[tuple[str, str]]:
    """(URL, model name) of an mlx_lm.server with the embedded model in float32: a hundred tokens
    of its four bits and bfloat16 take it a minute on a busy CPU."""
    path = str(home / "demo-float32")
    convert(str(demo_model.PATH), path, dtype="float32", dequantize=True)
    port, log = free_port(), home / "other.log"
    argv = ["-m", "mlx_lm.server", "--model", path, "--port", str(port)]
    with running(argv, clean_environment(home), log):
        wait_for(f"http://127.0.0.1:{port}/v1/models", log)
        yield f"http://127.0.0.1:{port}", path


@contextmanager
def whole_stack(home: Path, other: tuple[str, str] | None, **settings: str) -> Iterator[Stack]:
    router, sidecar, log = free_port(), free_port(), home / "up.log"
    url, model = other or (f"http://127.0.0.1:{free_port()}", "")
    environment = clean_environment(
        home,
        ROUTER_PORT=str(router),
        SIDECAR_PORT=str(sidecar),
        OLLAMA_BASE_URL=url,
        OLLAMA_MODEL=model,
        SIDECAR_MODEL="demo",
        **settings,
    )
    with running(["-m", "tqstack", "up"], environment, log) as process:
        urls = [f"http://127.0.0.1:{port}" for port in (router, sidecar)]
        stack = Stack(*urls, url, process.pid, settings.get("TQSTACK_API_KEY", ""))
        for service in urls:
            wait_for(f"{service}/health", log, key=stack.key)
        wait_until(lambda: backend_is_up(stack, "sidecar"), "the router sees the sidecar")
        if other:
            wait_until(lambda: backend_is_up(stack, "ollama"), "the router sees the other backend")
        yield stack


def backend_is_up(stack: Stack, name: str) -> bool:
    response = get(f"{stack.router}/health", stack.key)
    return response is not None and response.json()["backends"][name]["state"] == "up"
