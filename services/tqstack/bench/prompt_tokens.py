"""Prompts as tokens, and how much of one has been there before."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tqstack.bench.servers import Server

Message = dict[str, Any]


class PromptTokens:
    """A chat's prompt in tokens: as the server's own `/tokenize` tells, else by the model's files.

    Args:
        folder: the model's; None: only the server can tell.
    """

    def __init__(self, client: httpx.AsyncClient, server: Server, folder: Path | None):
        self._client = client
        self._server = server
        self._folder = folder
        self._server_tells = True
        self._tokenizer: Any = None

    async def of(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> np.ndarray | None:
        """The tokens, with the opening of an answer at the end; None: nobody can tell."""
        tokens = await self._remote(messages, tools) if self._server_tells else None
        if tokens is None:
            self._server_tells = False
            tokens = self._local(messages, tools) if self._folder else None
        return None if tokens is None else np.array(tokens)

    async def _remote(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> list[int] | None:
        body = {"model": self._server.model, "messages": messages, "tools": tools}
        url, headers = f"{self._server.url}/tokenize", self._server.headers
        try:
            response = await self._client.post(url, json=body, headers=headers)
            # llama.cpp has a /tokenize too, which takes no messages and finds no tokens.
            return response.json().get("tokens") or None if response.is_success else None
        except (httpx.HTTPError, ValueError, AttributeError):
            return None

    def _local(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]
    ) -> list[int] | None:
        if self._tokenizer is None:
            # It warns that there is no PyTorch, which a tokenizer does not need.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(str(self._folder))
        text = self._tokenizer.apply_chat_template(
            [_for_template(message) for message in messages],
            tools=list(tools),
            tokenize=False,
            add_generation_prompt=True,
        )
        return self._tokenizer.encode(text, add_special_tokens=False)


def _for_template(message: Message) -> Message:
    """Templates want the arguments of tool calls as objects."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        try:
            arguments = json.loads(call["function"]["arguments"] or "{}")
        except ValueError:
            arguments = {}
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


class History:
    """What a server has had in its hands: the tokens of prompts and their answers."""

    def __init__(self) -> None:
        self._entries: list[np.ndarray] = []

    def add(self, tokens: np.ndarray) -> None:
        self._entries.append(tokens)

    def reusable(self, prompt: np.ndarray) -> int:
        """Tokens at the prompt's beginning that an earlier entry begins with too.

        One token less than the prompt at most: its last one must be read to answer.
        """
        longest = max((common_prefix(entry, prompt) for entry in self._entries), default=0)
        return min(longest, len(prompt) - 1)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens in which both begin alike."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
