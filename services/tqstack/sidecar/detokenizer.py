"""Tokens to text as they come, byte by byte: nothing is trimmed, nothing normalised."""

from __future__ import annotations

import codecs
import json
from functools import lru_cache
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers.decoders import DecodeStream

_SPACE = "▁"  # how SentencePiece writes a space


class ByteText:
    """Text of a vocabulary whose tokens are bytes.

    Characters that are not whole yet are held back.
    """

    def __init__(self, tokenizer: Any, sentencepiece: bool):
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder  # made anew each time that it is asked for
        self._sentencepiece = sentencepiece
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token: int) -> str:
        return self._decode(self.bytes_of(token))

    def finish(self) -> str:
        """What no further token will complete."""
        return self._decode(b"", True)

    def bytes_of(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return added.content.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # past the vocabulary: models have more rows than tokens
            return b""
        if not self._sentencepiece:
            return b"".join(_BYTES.get(character, character.encode()) for character in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()


class OtherText:
    """Text of any other vocabulary, by its own decoder."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def feed(self, token: int) -> str:
        return self._stream.step(self._backend, token) or ""

    def finish(self) -> str:
        return ""


class LibraryText:
    """Text by mlx-lm's own detokenizer, for tokenizers that are no `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._detokenizer = tokenizer.detokenizer

    def feed(self, token: int) -> str:
        self._detokenizer.add_token(token)
        return self._detokenizer.last_segment

    def finish(self) -> str:
        self._detokenizer.finalize()
        return self._detokenizer.last_segment


Text = ByteText | OtherText | LibraryText


def text_stream(tokenizer: TokenizerWrapper) -> Text:
    """A decoder for the tokens of one answer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return LibraryText(tokenizer)
    kinds = _kinds(backend.decoder.__getstate__())
    if kinds == {"ByteLevel"}:
        return ByteText(tokenizer, sentencepiece=False)
    if "ByteFallback" in kinds or kinds == {"Metaspace"}:
        return ByteText(tokenizer, sentencepiece=True)
    return OtherText(tokenizer)


@lru_cache(8)
def _kinds(state: bytes) -> frozenset[str]:
    """Types of a decoder and of those that it is made of."""
    decoder = json.loads(state)
    parts = decoder.get("decoders") or [decoder]
    return frozenset(part["type"] for part in parts)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's characters for bytes: printable ones are themselves, others come after them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


@lru_cache(1)
def _text_of(tokenizer: TokenizerWrapper) -> Text:
    """A decoder for single tokens: making one looks all added tokens up."""
    return text_stream(tokenizer)


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """What a token is by itself; part of a character, where the vocabulary has such."""
    text = _text_of(tokenizer)
    if isinstance(text, ByteText):
        return text.bytes_of(token)
    return tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()
