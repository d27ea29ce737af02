"""Request bodies that come compressed."""

from __future__ import annotations

import zlib

from tqstack.openai_api.body import too_large
from tqstack.openai_api.errors import ApiError, bad_request


def decode(body: bytes, encoding: str, limit: int) -> bytes:
    """The body as it was before its Content-Encoding (`gzip`, `deflate`, `zstd`).

    Raises:
        ApiError: 413 if it grows over `limit` bytes, 415 for another encoding, 400 if it is broken.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name in ("gzip", "x-gzip", "deflate"):
        plain = _inflate(body, limit)
    elif name == "zstd":
        plain = _unzstd(body, limit)
    else:
        message = f"Content-Encoding {encoding!r} is not supported; send gzip, zstd or none"
        raise ApiError(415, message)
    if len(plain) > limit:
        raise too_large(limit)
    return plain


def _inflate(body: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise bad_request(f"the body is not valid gzip: {error}") from None
    if not inflater.eof and len(plain) <= limit:
        raise bad_request("the body is not valid gzip: it ends too early")
    return plain


def _unzstd(body: bytes, limit: int) -> bytes:
    import zstandard  # rare enough not to be loaded at start

    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body)
        return reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise bad_request(f"the body is not valid zstd: {error}") from None
