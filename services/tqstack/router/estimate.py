"""How many tokens a prompt has, told from its bytes, without a tokenizer.

A prompt is measured as a few counts (letters, words, digits, runs of marks, ...); a model's tokens
are a weighted sum of them. The weights start as an average over common tokenizers, and every
`usage.prompt_tokens` that a backend reports corrects those of its model (Bayesian linear
regression, one observation at a time), so that code, JSON and Chinese each come out right for the
tokenizer that is really there.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from operator import mul
from typing import Any, NamedTuple

import orjson


def _classes(**members: str) -> bytes:
    """A table for `bytes.translate` that makes each byte the first letter of its class's name; an
    ASCII byte of no class is a mark."""
    table = bytearray(b"m" * 128 + b"w" * 128)
    for name, characters in members.items():
        for character in characters.encode():
            table[character] = ord(name[0])
    return bytes(table)


_CLASS = _classes(
    lower=string.ascii_lowercase,
    Upper=string.ascii_uppercase,
    digit=string.digits,
    blank=" \t\v\f",
    newline="\r\n",
    _="_",
)
# Of classes: where a word starts, and where a run of marks does.
_IN_WORD = bytes(ord("l" if i in b"lU" else " ") for i in range(256))
_IN_MARKS = bytes(ord("m" if i in b"m_" else " ") for i in range(256))
# Longer texts are sampled: what is counted in so many evenly spaced pieces stands for the whole.
_PIECES = 32
_PIECE = 512
# An image costs between a hundred and a few thousand tokens, and its base64 says nothing about it.
IMAGE_TOKENS = 800


class Size(NamedTuple):
    """Counts of one prompt, tool schemas included."""

    letters: float
    capitals: float
    humps: float  # capitals after a small letter
    words: float
    digits: float
    marks: float
    mark_runs: float
    spaced_marks: float  # those after a blank
    underscores: float
    newlines: float
    wide: float  # bytes outside ASCII
    tools: float  # bytes of tool schemas: templates write them with more blanks
    messages: float
    images: int = 0


# Tokens for one of each: an average over tokenizers of 65,000 to 200,000 tokens. And how far that
# may be off (standard deviation).
_WEIGHTS = (0.05, 0.05, 1.1, 0.85, 0.6, 0.18, 0.4, 0.9, 0.2, 0.75, 0.32, 0.05, 5.0)
_SPREAD = (0.06, 0.3, 1.3, 0.8, 0.6, 0.3, 0.5, 0.9, 0.5, 0.75, 0.35, 0.06, 12.0)
# Relative error that remains when the weights are right.
_NOISE = 0.03
# The further off a report is, the less it is believed: it counts as one with this part of its error
# as noise. What is true is repeated, and learned; a wild report is not.
_DOUBT = 0.3


def measure(request: dict[str, Any]) -> Size:
    """The size of a chat, completion, embedding, Responses or Anthropic request."""
    texts: list[str] = []
    messages, images = _collect(request, texts)
    data = "\n".join(texts).encode(errors="replace")
    tools = orjson.dumps(request["tools"]) if request.get("tools") else b""
    return Size._make((*_counts(data + tools), len(tools), messages + 1, images))


def texts_of(request: dict[str, Any]) -> tuple[list[str], int]:
    """The texts of a request's prompt, and how many messages they are in."""
    texts: list[str] = []
    return texts, _collect(request, texts)[0]


def _collect(request: dict[str, Any], texts: list[str]) -> tuple[int, int]:
    """Collects a request's texts; returns how many messages and images it has."""
    messages = images = 0
    for key in ("messages", "input", "system", "prompt", "instructions"):
        value = request.get(key)
        if isinstance(value, list):  # of messages, texts or tokens
            messages += sum(isinstance(one, dict) for one in value)
        if value:
            images += _gather(value, texts)
    return messages, images


def _gather(value: Any, texts: list[str]) -> int:
    """Collects the texts inside `value`; returns how many images it holds."""
    if isinstance(value, str):
        texts.append(value)
        return 0
    if isinstance(value, list):
        if value and isinstance(value[0], int):  # a prompt given as tokens: a short word for each
            texts.append(" abc" * len(value))
            return 0
        return sum(_gather(item, texts) for item in value)
    if not isinstance(value, dict):
        return 0
    if "image" in str(value.get("type", "")):
        return 1
    images = 0
    for key in ("content", "text", "reasoning_content", "input", "output", "arguments"):
        if value.get(key):
            images += _gather(value[key], texts)
    calls = value.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            texts.append(str(call["function"]))
    return images


def _counts(data: bytes) -> list[float]:
    """The counts of a text, in the order of `Size`."""
    scale = 1.0
    if len(data) > 2 * _PIECES * _PIECE:
        step = len(data) // _PIECES
        whole = len(data)
        data = b"".join(data[i * step : i * step + _PIECE] for i in range(_PIECES))
        scale = whole / len(data)
    classes = data.translate(_CLASS)
    count = classes.count
    capitals = count(b"U")
    counts = (
        count(b"l") + capitals,
        capitals,
        count(b"lU"),
        (b" " + classes.translate(_IN_WORD)).count(b" l"),
        count(b"d"),
        count(b"m"),
        (b" " + classes.translate(_IN_MARKS)).count(b" m"),
        count(b"bm") + count(b"b_"),
        count(b"_"),
        count(b"n"),
        count(b"w"),
    )
    return [one * scale for one in counts]


class Weights:
    """Tokens per count for one model, corrected by what its backend reports."""

    def __init__(self) -> None:
        self._mean = list(_WEIGHTS)
        self._covariance = [
            [s * s if i == j else 0.0 for j in range(len(_SPREAD))] for i, s in enumerate(_SPREAD)
        ]

    def tokens(self, size: Size) -> int:
        return max(1, round(_dot(self._mean, size) + size.images * IMAGE_TOKENS))

    def learn(self, size: Size, true_tokens: int) -> None:
        """Takes in a true count.

        Counts that cannot be of this prompt (a backend that leaves out what was cached, or cut what
        is too long) and prompts with images teach nothing.
        """
        guess = self.tokens(size)
        wrong = abs(guess / true_tokens - 1)
        if size.images or wrong > 2.3 or guess * 6 < true_tokens or true_tokens < 8:
            return
        if wrong < _NOISE / 4:  # nothing to learn, and this runs for every answer
            return
        row = [count / true_tokens for count in size[: len(self._mean)]]
        error = 1 - _dot(self._mean, row)
        spread = [_dot(line, row) for line in self._covariance]
        noise = max(_NOISE, _DOUBT * abs(error))
        scale = noise * noise + _dot(spread, row)
        self._mean = [m + s * error / scale for m, s in zip(self._mean, spread, strict=True)]
        self._covariance = [
            [c - a * b / scale for c, b in zip(line, spread, strict=True)]
            for line, a in zip(self._covariance, spread, strict=True)
        ]


class Estimator:
    """Weights by model."""

    def __init__(self) -> None:
        self._weights: dict[str, Weights] = {}

    def tokens(self, model: str, size: Size) -> int:
        return self._weights.get(model, _UNTAUGHT).tokens(size)

    def learn(self, model: str, size: Size, true_tokens: int) -> None:
        if model not in self._weights:
            self._weights[model] = Weights()
        self._weights[model].learn(size, true_tokens)


_UNTAUGHT = Weights()


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Of as many as the shorter one has: a size ends with its images, which have no weight."""
    return sum(map(mul, a, b))
