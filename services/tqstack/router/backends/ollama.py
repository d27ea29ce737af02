"""What Ollama can hold. Past that it drops a chat's oldest messages, or half of a text, and says
nothing; only one message that alone is too long may be refused.

A model that is loaded tells (`/api/ps`). One that is not will hold its parameter `num_ctx`, and
never more than it was trained for (`/api/show`). Without a `num_ctx` Ollama decides when it loads
the model, by the memory that there is: 4,096 tokens or more.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

# Path, body (none: a GET), seconds; gives status and JSON. A ValueError if that is no object.
Ask = Callable[[str, bytes, float], Awaitable[tuple[int, dict[str, Any]]]]

LEAST = 4096  # tokens that Ollama gives a model on the smallest machine
_SHOW_SECONDS = 1.0  # for the models that are new; what is left is asked with the next probe
_NUM_CTX = re.compile(r"^num_ctx\s+(\d+)", re.M)


class _Shown(NamedTuple):
    """Tokens that `/api/show` tells of, if it does."""

    trained: int | None
    num_ctx: int | None


class Contexts:
    """Tokens that each model of an Ollama can hold; of another server, what its models say.

    Attributes:
        is_ollama: False once it has shown to be another server.
    """

    def __init__(self, ask: Ask):
        self._ask = ask
        self.is_ollama = True  # until it answers otherwise
        self._loaded: dict[str, int] = {}
        self._shown: dict[tuple[str, Any], _Shown] = {}

    def restart(self) -> None:
        """Another program may have come in its place."""
        self.is_ollama = True

    async def fill_in(self, models: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Entries of `/v1/models`, each with its `context_length`."""
        if not self.is_ollama:
            return models
        status, listing = await self._get("/api/ps")
        if status != 200:
            self.is_ollama = status >= 500  # in trouble, it is still what it was
            return models
        entries = [entry for entry in listing.get("models") or () if isinstance(entry, dict)]
        lengths = [
            (str(entry.get("name")), _tokens(entry.get("context_length"))) for entry in entries
        ]
        # A model that was made anew is there twice for a while, the newer one first.
        self._loaded = {name: length for name, length in reversed(lengths) if length}
        with suppress(TimeoutError):
            async with asyncio.timeout(_SHOW_SECONDS):
                await self._show_new(models)
        return [{**model, "context_length": self._context(model)} for model in models]

    def unknown(self, model: str) -> bool:
        """Whether only loading this model can tell."""
        shown = [shown for key, shown in self._shown.items() if key[0] == model]
        return self.is_ollama and model not in self._loaded and not any(s.num_ctx for s in shown)

    async def load(self, model: str, seconds: float) -> None:
        """Has the model loaded, as any request for it would."""
        await self._get("/api/generate", orjson.dumps({"model": model}), seconds)

    async def _show_new(self, models: list[dict[str, Any]]) -> None:
        keys = [(model["id"], model.get("created")) for model in models]
        self._shown = {key: shown for key, shown in self._shown.items() if key in keys}
        for key in keys:
            if key not in self._shown:
                status, answer = await self._get("/api/show", orjson.dumps({"model": key[0]}))
                self._shown[key] = _read(answer if status == 200 else {})

    def _context(self, model: dict[str, Any]) -> int | None:
        if model["id"] in self._loaded:
            return self._loaded[model["id"]]
        shown = self._shown.get((model["id"], model.get("created")))
        return min((tokens for tokens in shown or () if tokens), default=None)

    async def _get(
        self, path: str, body: bytes = b"", seconds: float = _SHOW_SECONDS
    ) -> tuple[int, dict[str, Any]]:
        try:
            return await self._ask(path, body, seconds)
        except ValueError:
            return 404, {}


def _read(shown: dict[str, Any]) -> _Shown:
    info, parameters = shown.get("model_info"), shown.get("parameters")
    lengths = info.items() if isinstance(info, dict) else ()
    # The key begins with the architecture: `qwen3.context_length`.
    trained = [_tokens(value) for key, value in lengths if key.endswith(".context_length")]
    own = _NUM_CTX.search(parameters) if isinstance(parameters, str) else None
    num_ctx = int(own[1]) if own else None
    if shown.get("remote_host"):  # in the cloud, where nothing has to be loaded
        num_ctx = next(iter(trained), LEAST)
    return _Shown(next(iter(trained), None), num_ctx)


def _tokens(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
