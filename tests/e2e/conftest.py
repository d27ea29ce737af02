from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tqstack import demo_model
from tqstack.bench.needle import Haystack, Needle
from whole_stack import Stack, other_backend, whole_stack


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def other(home) -> Iterator[tuple[str, str]]:
    with other_backend(home) as other:
        yield other


@pytest.fixture(scope="session")
def stack(home, other) -> Iterator[Stack]:
    """Prompts of 500 tokens are long here, so that tests of the routing stay quick."""
    with whole_stack(home, other, PROMPT_TOKEN_THRESHOLD="500") as stack:
        yield stack


@pytest.fixture(scope="session")
def needle_of() -> Callable[[int, int], Needle]:
    """Documents with facts in them: length in tokens, and a seed."""
    tokenizer = Tokenizer.from_file(str(demo_model.PATH / "tokenizer.json"))
    tokens = demo_model.held_out_tokens().tolist()

    class Plain:
        def encode(self, text, **_):
            return tokenizer.encode(text).ids

        def decode(self, tokens):
            return tokenizer.decode(tokens)

    def needle(length, seed=0):
        facts = 1 if length < 100 else 4
        return Haystack.make(Plain(), tokens, length, seed, facts).needles[-1]

    return needle
