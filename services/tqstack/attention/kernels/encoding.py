"""Encoding keys and values by kernel or by plain operations: a kernel runs where it can, and only
after it agreed with its twin (`trust.py`)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from tqstack.attention.kernels import encode, trellis_search
from tqstack.attention.kernels.trust import check, distance, random, trusted
from tqstack.turboquant.trellis import TrellisCodec

Planes = tuple[mx.array, ...]


def encode_pair(
    keys: mx.array, values: mx.array, key_codec: Any, value_codec: Any
) -> tuple[Planes, Planes]:
    """Compress (B, KV heads, L, head_dim) keys and values."""
    codecs = key_codec, value_codec
    if encode.serves(*codecs) and trusted("encode", *codecs, keys.dtype):
        return encode.encode(keys, values, *codecs)
    return _encode(keys, key_codec), _encode(values, value_codec)


def _encode(x: mx.array, codec: Any) -> Planes:
    if x.size and isinstance(codec, TrellisCodec) and trusted("search", codec):
        return trellis_search.encode(codec, x)
    return codec.encode(x)


@check("encode")
def _encode_error(key_codec: Any, value_codec: Any, dtype: mx.Dtype) -> float:
    """How much farther from the vectors the kernel's encoding is than the twin's, or nearer.

    Single codes may differ: a value next to a boundary between two is as near to either.
    """
    codecs = key_codec, value_codec
    keys, values = (random(1, 2, 64, codec.dim, seed=codec.dim).astype(dtype) for codec in codecs)
    planes, errors = encode.encode(keys, values, *codecs), []
    with mx.stream(mx.cpu):  # where plain operations need no compiler
        for codec, x, got in zip(codecs, (keys, values), planes, strict=True):
            x = x.astype(mx.float32)
            rotated, want = codec.rotate(x), codec.decode(codec.encode(x))
            errors.append(distance(codec.decode(got), rotated) - distance(want, rotated))
    return max(errors, key=abs)


@check("search")
def _search_error(codec: Any) -> float:
    """How much farther from the vectors the kernel's codes are than the twin's, or nearer."""
    x = random(64, codec.dim, seed=codec.dim)
    got, want = trellis_search.encode(codec, x), codec.encode(x)
    rotated = codec.rotate(x)
    return distance(codec.decode(got), rotated) - distance(codec.decode(want), rotated)
