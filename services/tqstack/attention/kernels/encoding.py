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
    if encode.serves(key_codec, value_codec) and trusted("encode", key_codec, value_codec):
        return encode.encode(keys, values, key_codec, value_codec)
    return _encode(keys, key_codec), _encode(values, value_codec)


def _encode(x: mx.array, codec: Any) -> Planes:
    if x.size and isinstance(codec, TrellisCodec) and trusted("search", codec):
        return trellis_search.encode(codec, x)
    return codec.encode(x)


@check("encode")
def _encode_error(key_codec: Any, value_codec: Any) -> float:
    """How much farther from the vectors the kernel's encoding is than the twin's, or nearer.

    Single codes may differ: a value next to a boundary between two is as near to either.
    """
    keys, values = (random(1, 2, 64, c.dim, seed=c.dim) for c in (key_codec, value_codec))
    planes = encode.encode(keys, values, key_codec, value_codec)
    errors = [
        distance(codec.decode(got), codec.rotate(x))
        - distance(codec.decode(codec.encode(x)), codec.rotate(x))
        for codec, x, got in zip((key_codec, value_codec), (keys, values), planes, strict=True)
    ]
    return max(errors, key=abs)


@check("search")
def _search_error(codec: Any) -> float:
    """How much farther from the vectors the kernel's codes are than the twin's, or nearer."""
    x = random(64, codec.dim, seed=codec.dim)
    got, want = trellis_search.encode(codec, x), codec.encode(x)
    rotated = codec.rotate(x)
    return distance(codec.decode(got), rotated) - distance(codec.decode(want), rotated)
