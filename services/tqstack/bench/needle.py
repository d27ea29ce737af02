"""Needles in a haystack: facts hidden in long text, and questions about them.

The embedded model was trained to answer these; a larger model answers them anyway.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any, Protocol

NAMES = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india"),
    *("juliet", "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo"),
    *("sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
)


class Tokenizer(Protocol):
    def encode(self, text: str, **options: Any) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True)
class Needle:
    """A chat that asks for one code, and the code."""

    messages: list[dict[str, str]]
    question: str
    code: str


@dataclass(frozen=True)
class Haystack:
    """A document with facts in it, and what they are: code by name."""

    document: str
    codes: dict[str, str]

    @classmethod
    def make(
        cls, tokenizer: Tokenizer, tokens: list[int], length: int, seed: int = 0, facts: int = 4
    ) -> Haystack:
        """Hide `facts` codes at random places, for a chat prompt of about `length` tokens.

        Args:
            tokens: text to build it from, repeated if it is too short.
        """
        rng = random.Random(seed)
        start = rng.randrange(max(1, len(tokens) - length))
        text = tokens[start:] + tokens
        while len(text) < length:
            text += tokens
        names = rng.sample(NAMES, facts)
        codes = {name: f"{rng.randrange(10_000, 100_000)}" for name in names}
        sentences = [f"\nThe secret code of {name} is {code}.\n" for name, code in codes.items()]
        taken = sum(len(tokenizer.encode(sentence)) for sentence in sentences)
        room = length - taken - 30  # 30: the question, and the chat's markers
        edges = [0, *sorted(rng.randrange(room) for _ in sentences), room]
        pieces = [tokenizer.decode(text[a:b]) for a, b in itertools.pairwise(edges)]
        document = "".join(a + b for a, b in zip(pieces, [*sentences, ""], strict=True))
        return cls(document, codes)

    def needle(self, name: str) -> Needle:
        question = f"What is the secret code of {name}?"
        content = f"{self.document}\n\n{question}"
        return Needle([{"role": "user", "content": content}], question, self.codes[name])

    @property
    def needles(self) -> list[Needle]:
        return [self.needle(name) for name in self.codes]
