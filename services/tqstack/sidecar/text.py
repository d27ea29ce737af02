"""From tokens to what the client sees: content, reasoning, tool calls, stop strings. No model here.

Markers of reasoning and tool calls are mlx-lm's, per model family; so are the parsers of the calls.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass
class Content:
    text: str


@dataclass
class Reasoning:
    text: str


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str


Part = Content | Reasoning | ToolCall


class StopStrings:
    """Finds the first stop string in text that comes in pieces; holds back what may become one."""

    def __init__(self, stops: Iterable[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Text that is safe to show. After a hit nothing is."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max(self._partial(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _partial(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


class AnswerReader:
    """Turns the tokens of one answer into parts.

    Args:
        tokenizer: brings detokenizer, markers and tool parser of the model's family.
        stops: stop strings of the request; they end the content and are not shown.
        tools: the request's tools; without any, text that looks like a call stays text.
        reasoning: whether the prompt's end has opened a reasoning block already.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        stops: Iterable[str] = (),
        tools: list[dict[str, Any]] | None = None,
        reasoning: bool = False,
        plain: bool = False,
    ):
        self._detokenizer = tokenizer.detokenizer
        self._tools = tools
        self._parse = tokenizer.tool_parser
        self._markers = (tokenizer.tool_call_start or "", tokenizer.tool_call_end or "")
        machine = TextStateMachine() if plain else make_text_state_machine(tokenizer)
        start = tokenizer.response_initial_state or ("reasoning" if reasoning else "normal")
        self._state = machine.make_state("normal" if plain else start)
        self._mode = self._state[0]
        self._stop = StopStrings(stops)
        self._call = ""
        self.tool_calls = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found: the answer is complete."""
        return self._stop.hit

    def feed(self, token: int) -> list[Part]:
        self._detokenizer.add_token(token)
        return self._split(self._detokenizer.last_segment)

    def finish(self) -> list[Part]:
        """Everything that was held back."""
        self._detokenizer.finalize()
        parts = self._split(self._detokenizer.last_segment)
        self._state, rest, _ = TextStateMachine.flush(self._state)
        parts += self._take(self._mode, rest)
        if self._mode == "tool":
            # Without an end marker the end of the answer ends the call; else it was cut short.
            parts += self._end_call(complete=not self._markers[1])
        parts += [Content(text)] if (text := self._stop.flush()) else []
        return parts

    def _split(self, text: str) -> list[Part]:
        if not text:
            return []
        self._state, segments = TextStateMachine.split(self._state, text)
        parts: list[Part] = []
        for i, (mode, segment) in enumerate(segments):
            if i and self._mode == "tool":
                parts += self._end_call(complete=True)
            self._mode = mode or "normal"
            parts += self._take(self._mode, segment)
        return parts

    def _take(self, mode: str, text: str) -> list[Part]:
        if mode == "tool":
            self._call += text
            return []
        if mode == "reasoning":
            return [Reasoning(text)] if text and not self.stopped else []
        shown = self._stop.feed(text)
        return [Content(shown)] if shown else []

    def _end_call(self, complete: bool) -> list[Part]:
        text, self._call = self._call, ""
        calls = self._parsed(text) if complete else []
        if self.stopped:
            return []
        if calls:
            self.tool_calls += len(calls)
            return list(calls)
        start, end = self._markers
        return self._take("normal", start + text + (end if complete else ""))

    def _parsed(self, text: str) -> list[ToolCall]:
        """Calls in `text`; none if it does not parse: then the client gets the text itself."""
        if self._parse is None or not self._tools:
            return []
        try:
            parsed = self._parse(text, self._tools)
            calls = parsed if isinstance(parsed, list) else [parsed]
            return [
                ToolCall(
                    call.get("id") or f"call_{uuid.uuid4().hex[:24]}",
                    call["name"],
                    json.dumps(call.get("arguments", {}), ensure_ascii=False),
                )
                for call in calls
            ]
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            return []
