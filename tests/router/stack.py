"""A router and two scripted backends on free ports, in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import anthropic
import httpx
import openai
import uvloop

from router.scripted import Scripted, says
from tqstack.router.app import RouterApp
from tqstack.router.serve import server
from tqstack.settings import Settings

Result = TypeVar("Result")
LONG = "word " * 20_000  # far over every threshold
HYBRID = {
    "status": "ok",
    "model": {"id": "demo", "architecture": "hybrid", "context_length": 262_144},
    "requests": {"running": 0, "waiting": 0},
}


class Stack:
    """`with Stack() as stack:`; the backends are `stack.sidecar` and `stack.ollama`."""

    def __init__(self, sidecar: bool = True, ollama: bool = True, **settings: Any):
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._settings = settings
        self._start = (sidecar, ollama)
        self.sidecar = Scripted("sidecar", says("from ", "the ", "sidecar"), ["demo"], {**HYBRID})
        self.ollama = Scripted("ollama", says("from ", "ollama"), ["llama3:latest", "qwen"])
        self.scripted = [self.sidecar, self.ollama]

    def __enter__(self) -> Stack:
        self._thread.start()
        self.run(self._up())
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=20
        )
        self.anthropic = anthropic.Anthropic(
            base_url=self.url, api_key="none", max_retries=0, timeout=20
        )
        return self

    async def _up(self) -> None:
        for backend, wanted in zip((self.sidecar, self.ollama), self._start, strict=True):
            await backend.start()
            if not wanted:
                await backend.stop()
        settings = Settings(
            **{
                "sidecar_port": self.sidecar.port,
                "ollama_base_url": f"http://127.0.0.1:{self.ollama.port}",
                **self._settings,
            }
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = server(settings)
        self.app = cast(RouterApp, self._server.config.app)
        self._serving = asyncio.ensure_future(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.01)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine on the loop of the router and the backends."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def probe(self) -> None:
        """Has the router look at its backends now."""
        for backend in self.app.state.services.backends.values():
            self.run(backend.probe.check())

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()
        self.run(self._down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def settle(self) -> None:
        """Waits until every request is over and done with, on the router's side and the backends'.

        A client has its answer a moment before the router has written it down.
        """
        journal, deadline = self.app.state.services.journal, time.monotonic() + 3
        while journal.running or any(backend.busy for backend in self.scripted):
            assert time.monotonic() < deadline, "a request was left behind"
            time.sleep(0.002)

    def stop_serving(self) -> None:
        """What SIGTERM does."""
        self._server.should_exit = True

    async def _down(self) -> None:
        self.stop_serving()
        for backend in self.scripted:
            await backend.stop()
        await self._serving

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, text: str = "hello", **body: Any) -> httpx.Response:
        return self.post(messages=[{"role": "user", "content": text}], **body)


def answer_of(response: httpx.Response) -> tuple[str, str, str | None]:
    """Text, who answered, and instead of whom."""
    headers = response.headers
    text = response.json()["choices"][0]["message"]["content"]
    return text, headers["x-tqstack-backend"], headers.get("x-tqstack-fallback-from")


def stream_answer(response: httpx.Response) -> tuple[str, dict | None]:
    """The text of a stream, and its error. Every event must be whole."""
    text, error = "", None
    for event in response.text.split("\n\n"):
        if not event or event.startswith(":") or event == "data: [DONE]":
            continue
        value = json.loads(event.removeprefix("data: "))
        assert error is None, "something follows an error"
        if "error" in value:
            error = value["error"]
        else:
            text += value["choices"][0]["delta"]["content"]
    return text, error
