"""Log-probabilities as clients read them, and which tokens a piece of text is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from tqstack.engine.logprobs import Logprob
from tqstack.sidecar.detokenizer import token_bytes

LEAST = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Spoken:
    """A token of an answer.

    Attributes:
        value: None: nothing came before it.
        top: the likeliest tokens of its place, and theirs.
        at: characters of the text before it.
    """

    text: bytes
    value: float | None
    top: tuple[tuple[bytes, float], ...] = ()
    at: int = 0


def spoken(tokenizer: TokenizerWrapper, told: Logprob, at: int) -> Spoken:
    top = tuple((token_bytes(tokenizer, token), max(LEAST, v)) for token, v in told.top)
    return Spoken(token_bytes(tokenizer, told.token), max(LEAST, told.value), top, at)


class Trail:
    """Tokens whose text has not been shown yet."""

    def __init__(self) -> None:
        self._tokens: list[Spoken] = []

    def add(self, token: Spoken) -> None:
        self._tokens.append(token)

    def shown(self, characters: int) -> list[Spoken]:
        """Those that are, once so many characters of the text have been shown."""
        count = next((i for i, t in enumerate(self._tokens) if t.at >= characters), None)
        count = len(self._tokens) if count is None else count
        found, self._tokens = self._tokens[:count], self._tokens[count:]
        return found

    def clear(self) -> None:
        """What was waiting is no text."""
        self._tokens = []


def chat_form(tokens: list[Spoken]) -> dict[str, Any]:
    """A chat's `logprobs`."""
    content = [
        {
            **_chat_entry(token.text, token.value),
            "top_logprobs": [_chat_entry(text, value) for text, value in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_entry(text: bytes, value: float | None) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": value, "bytes": list(text)}


def text_form(tokens: list[Spoken]) -> dict[str, Any]:
    """A completion's `logprobs`."""
    return {
        "tokens": [_name(token.text) for token in tokens],
        "token_logprobs": [token.value for token in tokens],
        "top_logprobs": [
            None if token.value is None else {_name(text): value for text, value in token.top}
            for token in tokens
        ],
        "text_offset": [token.at for token in tokens],
    }


def _name(text: bytes) -> str:
    """A token as OpenAI writes it where it is no whole text."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def prompt_form(
    tokenizer: TokenizerWrapper, tokens: list[int], told: dict[int, Logprob], top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of each token of the prompt and the likeliest of its place."""
    listed: list[dict[str, Any] | None] = []
    for at in range(len(tokens)):
        one = told.get(at)
        if one is None:
            listed.append(None)
            continue
        values = {one.token: one.value, **dict(one.top[:top])}
        listed.append(
            {
                str(token): {
                    "logprob": max(LEAST, value),
                    "decoded_token": token_bytes(tokenizer, token).decode("utf-8", "replace"),
                }
                for token, value in values.items()
            }
        )
    return listed
