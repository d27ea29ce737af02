"""Forms that an answer must have: which tokens may come next, by llguidance.

A form is plain data; compiled ones are kept, and each sequence goes its way through a copy.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

KEPT = 64  # compiled grammars
LONGEST = 1 << 20  # characters of one


@dataclass(frozen=True)
class Grammar:
    """
    Attributes:
        kind: of `text`: a JSON schema, a regular expression, or llguidance's dialect of Lark.
        after: tokens behind which the form begins, such as the end of a reasoning block; none: at
            once.
        opening: with it, the form begins behind `after` only if this is the first token, and else
            at once.
    """

    kind: Literal["json", "regex", "lark"]
    text: str
    after: tuple[int, ...] = ()
    opening: int | None = None


class GrammarError(ValueError):
    """A form that cannot be had; the message says what is wrong with it."""


class Form:
    """One sequence's way through its grammar."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar, ends: frozenset[int]):
        self._matcher, self._ends = matcher, ends
        self._after, self._opening = grammar.after, grammar.opening
        self._waits = bool(self._after) and self._opening is None
        self._recent: tuple[int, ...] = ()
        self._ended = False

    def take(self, token: int) -> None:
        """The sequence has got a token.

        Raises:
            GrammarError: it is not one that was allowed, or the grammar is too complex.
        """
        if token == self._opening:
            self._opening, self._waits = None, True
            return
        self._opening = None
        if self._waits:
            self._recent = (*self._recent, token)[-len(self._after) :]
            self._waits = self._recent != self._after
        elif not self._ended:
            self._ended = token in self._ends
            # The end may come early, where the answer has not the form yet.
            if not self._ended and not self._matcher.consume_token(token):
                raise GrammarError(self._matcher.get_error())

    def allowed(self, vocabulary: int) -> np.ndarray | None:
        """Which tokens may come next, (vocabulary,) bool; None: all.

        Raises:
            GrammarError: the grammar is too complex.
        """
        if self._waits or self._ended:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error())
        mask = np.zeros(vocabulary, bool)
        found = np.unpackbits(bits, bitorder="little")[:vocabulary]
        mask[: len(found)] = found
        if self._opening is not None:
            mask[self._opening] = True
        return mask


class Grammars:
    """Compiled grammars of one model, those that were used last.

    Args:
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, ends: frozenset[int]):
        self._own, self._ends = tokenizer, ends
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._compiled)

    def form(self, grammar: Grammar) -> Form:
        """The beginning of a sequence in this form.

        Raises:
            GrammarError: the grammar is none, or too complex.
        """
        key = (grammar.kind, grammar.text)
        with self._lock:
            matcher = self._compiled.get(key) or self._compile(grammar)
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Form(matcher.deep_copy(), grammar, self._ends)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if len(grammar.text) > LONGEST:
            raise GrammarError(f"it has more than {LONGEST} characters")
        self._tokenizer = self._tokenizer or self._described()
        try:
            matcher = LLMatcher(self._tokenizer, _MAKERS[grammar.kind](grammar.text), log_level=0)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return matcher

    def _described(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it; takes a second for a large vocabulary."""
        backend: Any = getattr(self._own, "backend_tokenizer", None)
        if backend is None:
            raise GrammarError("this model's tokenizer cannot be forced into a form")
        return LLTokenizer(backend.to_str(), eos_token=sorted(self._ends))


_MAKERS = {
    "json": LLMatcher.grammar_from_json_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}
