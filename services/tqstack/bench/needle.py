"""Needles in a haystack: facts hidden in long text, and questions about them.

The embedded model was trained to answer these; a larger model answers them anyway.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any, Protocol

NAMES = (
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
)


class Tokenizer(Protocol):
    def encode(self, text: str, **options: Any) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True)
class Needle:
    """A document with facts in it, and one question whose answer is known."""

    document: str
    name: str
    code: str

    @property
    def question(self) -> str:
        return f"What is the secret code of {self.name}?"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{self.document}\n\n{self.question}"}]


def hide(
    tokenizer: Tokenizer, tokens: list[int], length: int, seed: int = 0, facts: int = 4
) -> Needle:
    """Hide `facts` codes at random places of a document of about `length` tokens.

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
    room = length - sum(len(tokenizer.encode(s)) for s in sentences) - 30  # 30: question, markers
    edges = [0, *sorted(rng.randrange(room) for _ in sentences), room]
    pieces = [tokenizer.decode(text[a:b]) for a, b in itertools.pairwise(edges)]
    document = "".join(a + b for a, b in zip(pieces, [*sentences, ""], strict=True))
    asked = rng.choice(names)
    return Needle(document, asked, codes[asked])
