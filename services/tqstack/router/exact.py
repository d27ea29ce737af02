"""Counting a prompt with the sidecar's own tokenizer, for prompts so near the threshold that an
estimate would be a coin toss."""

from __future__ import annotations

import asyncio
import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from tqstack.machine import hub_folder
from tqstack.router.estimate import texts_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

NEAR = 0.15  # of the threshold
_TEMPLATE_TOKENS = 5  # that a chat template puts around each message


class ExactCounter:
    """Counts tokens in a thread. Without a tokenizer on disk there is nothing to count with."""

    def __init__(self, model: str):
        self._model = model

    async def count(self, request: dict[str, Any]) -> int | None:
        """Prompt tokens of a request; `None` if the tokenizer is not here."""
        return await asyncio.to_thread(self._count, request)

    def _count(self, request: dict[str, Any]) -> int | None:
        if self._tokenizer is None:
            return None
        texts, messages = texts_of(request)
        if request.get("tools"):
            texts.append(orjson.dumps(request["tools"]).decode())
        text = "\n".join(texts)
        return len(self._tokenizer.encode(text).ids) + _TEMPLATE_TOKENS * (messages + 1)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        path = find_tokenizer(self._model)
        if path is None:
            return None
        try:
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other type
            log.warning("the tokenizer %s cannot be used: %s", path, error)
            return None


def find_tokenizer(model: str) -> Path | None:
    """The `tokenizer.json` of a model that is on this machine: `demo`, a folder, or a hub name."""
    candidates = [
        Path(__file__).parents[1] / "demo_model" if model == "demo" else Path(model).expanduser(),
        *sorted(hub_folder(model).glob("snapshots/*")),
    ]
    files = (folder / "tokenizer.json" for folder in candidates)
    return next((file for file in files if file.is_file()), None)
