"""How many tokens a prompt has, told from its bytes, without a tokenizer.

A prompt is measured as a few counts (letters, digits, blanks, ...); a model's tokens are a weighted
sum of them. The weights start as an average over common tokenizers, and every `usage.prompt_tokens`
that a backend reports corrects those of its model (Bayesian linear regression, one observation at a
time), so that code, JSON and Chinese each come out right for the tokenizer that is really there.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from operator import mul
from typing import Any, NamedTuple

import orjson

_LETTERS = string.ascii_letters.encode()
_DIGITS = string.digits.encode()
_BLANKS = string.whitespace.encode()
_WIDE = bytes(range(128, 256))
# Longer texts are sampled: what is counted in so many evenly spaced pieces stands for the whole.
_PIECES = 16
_PIECE = 4096
# An image costs between a hundred and a few thousand tokens, and its base64 says nothing about it.
IMAGE_TOKENS = 800


class Size(NamedTuple):
    """Counts of one prompt: bytes of text by kind, bytes of tool schemas, messages, and images."""

    letters: float
    digits: float
    blanks: float
    marks: float
    wide: float
    tools: float
    messages: float
    images: int = 0


# Tokens for one of each, and how much that varies between tokenizers (standard deviation).
_WEIGHTS = (0.19, 0.55, 0.09, 0.55, 0.27, 0.26, 4.0)
_SPREAD = (0.06, 0.3, 0.07, 0.25, 0.15, 0.1, 3.0)
# Relative error that remains when the weights are right.
_NOISE = 0.04


def measure(request: dict[str, Any]) -> Size:
    """The size of a chat, completion, embedding, Responses or Anthropic request."""
    texts: list[str] = []
    messages, images = _collect(request, texts)
    tools = request.get("tools")
    tool_bytes = len(orjson.dumps(tools)) if tools else 0
    data = "\n".join(texts).encode(errors="replace")
    return Size(*_kinds(data), tool_bytes, messages + 1, images)


def texts_of(request: dict[str, Any]) -> tuple[list[str], int]:
    """The texts of a request's prompt, and how many messages they are in."""
    texts: list[str] = []
    return texts, _collect(request, texts)[0]


def _collect(request: dict[str, Any], texts: list[str]) -> tuple[int, int]:
    """Collects a request's texts; returns how many messages and images it has."""
    messages = images = 0
    for key in ("messages", "input", "system", "prompt", "instructions"):
        value = request.get(key)
        if isinstance(value, list):
            messages += len(value)
        if value:
            images += _gather(value, texts)
    return messages, images


def _gather(value: Any, texts: list[str]) -> int:
    """Collects the texts inside `value`; returns how many images it holds."""
    if isinstance(value, str):
        texts.append(value)
        return 0
    if isinstance(value, list):
        return sum(_gather(item, texts) for item in value)
    if isinstance(value, int):  # a prompt given as tokens: about four bytes each
        texts.append("abc ")
        return 0
    if not isinstance(value, dict):
        return 0
    if "image" in str(value.get("type", "")):
        return 1
    images = 0
    for key in ("content", "text", "reasoning_content", "input", "output", "arguments"):
        if value.get(key):
            images += _gather(value[key], texts)
    for call in value.get("tool_calls") or ():
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            texts.append(str(call["function"]))
    return images


def _kinds(data: bytes) -> tuple[float, float, float, float, float]:
    scale = 1.0
    if len(data) > 2 * _PIECES * _PIECE:
        step = len(data) // _PIECES
        whole = len(data)
        data = b"".join(data[i * step : i * step + _PIECE] for i in range(_PIECES))
        scale = whole / len(data)
    size = len(data)
    letters = size - len(data.translate(None, _LETTERS))
    digits = size - len(data.translate(None, _DIGITS))
    blanks = size - len(data.translate(None, _BLANKS))
    wide = size - len(data.translate(None, _WIDE))
    marks = size - letters - digits - blanks - wide
    return letters * scale, digits * scale, blanks * scale, marks * scale, wide * scale


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

        Counts that cannot be of this prompt (Ollama leaves out what was cached, and cuts what is
        too long) and prompts with images teach nothing.
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
        scale = _NOISE * _NOISE + _dot(spread, row)
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
