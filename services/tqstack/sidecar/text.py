"""From tokens to what the client sees: content, reasoning, tool calls, stop strings. No model here.

Markers of reasoning and tool calls are mlx-lm's, per model family; so are the parsers of the calls.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.engine.logprobs import Logprob
from tqstack.sidecar.detokenizer import text_stream
from tqstack.sidecar.logprobs import Spoken, Trail, spoken
from tqstack.sidecar.parameters import with_nulls, with_one_type


@dataclass
class Content:
    """
    Attributes:
        tokens: those that it is made of, where their log-probabilities are wanted.
    """

    text: str
    tokens: list[Spoken] = field(default_factory=list)


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
    """Finds the first stop string in text that comes in pieces; holds back what may become one.

    Args:
        shown: the stop string itself is part of the text.

    Attributes:
        active: whether text may end now.
        found: the one that ended the text.
    """

    def __init__(self, stops: Iterable[str], shown: bool = False):
        self._stops = [stop for stop in stops if stop]
        self._shown = shown
        self._held = ""
        self.active = True
        self.found: str | None = None

    @property
    def hit(self) -> bool:
        return self.found is not None

    def feed(self, text: str) -> str:
        """Text that is safe to show. After a hit nothing is."""
        if self.hit or not self._stops or not self.active:
            return "" if self.hit else text
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.found = min(found)
            self._held = ""
            return text[: at + len(self.found) if self._shown else at]
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
        plain: text only; no reasoning, no calls.
        show_stop: the stop string is part of the content.
        one_call: the answer ends with its first call.
        min_tokens: so many may not be ended by a stop string.
        before: characters that are shown before the answer.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        stops: Iterable[str] = (),
        tools: list[dict[str, Any]] | None = None,
        reasoning: bool = False,
        plain: bool = False,
        show_stop: bool = False,
        one_call: bool = False,
        min_tokens: int = 0,
        before: int = 0,
    ):
        self._tokenizer, self._trail = tokenizer, Trail()
        self._left = min_tokens
        self._came = self._shown = before  # characters of content
        self._text = text_stream(tokenizer)
        self._one_call = one_call
        self._tools, self._read_as = tools, with_one_type(tools)
        self._parse = tokenizer.tool_parser
        self._markers = (tokenizer.tool_call_start or "", tokenizer.tool_call_end or "")
        machine = TextStateMachine() if plain else make_text_state_machine(tokenizer)
        start = tokenizer.response_initial_state or ("reasoning" if reasoning else "normal")
        self._state = machine.make_state("normal" if plain else start)
        self._mode = self._state[0]
        self._stop = StopStrings(stops, show_stop)
        self._call = ""
        self.tool_calls = 0

    @property
    def stopped(self) -> bool:
        """The answer is complete: a stop string was found, or the one call that was wanted."""
        return self._stop.hit or (self._one_call and self.tool_calls > 0)

    @property
    def in_reasoning(self) -> bool:
        return self._mode == "reasoning"

    @property
    def stop_string(self) -> str | None:
        return self._stop.found

    def feed(self, token: int, told: Logprob | None = None) -> list[Part]:
        """Parts that a token completes; with what is told of it, text is shown with its tokens."""
        self._left -= 1
        self._stop.active = self._left < 0
        at, before = self._came, self._mode
        parts = self._split(self._text.feed(token))
        if told is not None:
            if self._mode != "normal":
                self._trail.clear()
            elif before == "normal":
                self._trail.add(spoken(self._tokenizer, told, at))
            self._attach(parts)
        return parts

    def _attach(self, parts: list[Part]) -> None:
        """Give text that is shown its tokens."""
        texts = [part for part in parts if isinstance(part, Content)]
        if texts:
            texts[-1].tokens += self._trail.shown(self._shown)

    def finish(self) -> list[Part]:
        """Everything that was held back."""
        parts = self._split(self._text.finish())
        self._state, rest, _ = TextStateMachine.flush(self._state)
        parts += self._take(self._mode, rest)
        if self._mode == "tool":
            # Without an end marker the end of the answer ends the call; else it was cut short.
            parts += self._end_call(complete=not self._markers[1])
        if text := self._stop.flush():
            self._shown += len(text)
            parts.append(Content(text))
        self._attach(parts)
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
        if self.stopped:
            return []
        if mode == "reasoning":
            return [Reasoning(text)] if text else []
        shown = self._stop.feed(text)
        self._came, self._shown = self._came + len(text), self._shown + len(shown)
        return [Content(shown)] if shown else []

    def _end_call(self, complete: bool) -> list[Part]:
        text, self._call = self._call, ""
        calls = self._parsed(text) if complete else []
        if self.stopped:
            return []
        if calls:
            calls = calls[:1] if self._one_call else calls
            self.tool_calls += len(calls)
            return list(calls)
        start, end = self._markers
        return self._take("normal", start + text + (end if complete else ""))

    def _parsed(self, text: str) -> list[ToolCall]:
        """Calls in `text`; none if it does not parse: then the client gets the text itself."""
        if self._parse is None or not self._tools:
            return []
        try:
            parsed = self._parse(text, self._read_as)
            calls = parsed if isinstance(parsed, list) else [parsed]
            return [
                ToolCall(
                    call.get("id") or f"call_{uuid.uuid4().hex[:24]}",
                    call["name"],
                    self._arguments(call),
                )
                for call in calls
            ]
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
            return []

    def _arguments(self, call: dict[str, Any]) -> str:
        arguments = with_nulls(call.get("arguments", {}), call["name"], self._tools or [])
        return json.dumps(arguments, ensure_ascii=False)
