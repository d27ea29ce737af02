"""Kernel or plain operations: a kernel runs where it can, and only after it agreed with its twin.

The first use of a pair of codecs compares both on random numbers, on this machine. A kernel that
does not compile, or disagrees, is switched off with a warning, and `tqstack doctor` says why.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

from tqstack.attention.kernels import decode, encode, trellis_search
from tqstack.attention.kernels.program import backend, fault
from tqstack.attention.tiled import tiled_attention
from tqstack.turboquant.codec import Codec
from tqstack.turboquant.trellis import TrellisCodec

TOLERANCE = 1e-3  # relative error of an output against the twin
Planes = tuple[mx.array, ...]


def encode_pair(
    keys: mx.array, values: mx.array, key_codec: Any, value_codec: Any
) -> tuple[Planes, Planes]:
    """Compress (B, KV heads, L, head_dim) keys and values."""
    if encode.serves(key_codec, value_codec) and trusted("encode", key_codec, value_codec):
        return encode.encode(keys, values, key_codec, value_codec)
    return _encode(keys, key_codec), _encode(values, value_codec)


def _encode(x: mx.array, codec: Any) -> Planes:
    if x.size and isinstance(codec, TrellisCodec) and trusted("search", codec, codec):
        return trellis_search.encode(codec, x)
    return codec.encode(x)


def attention(
    queries: mx.array,
    keys: Planes,
    values: Planes,
    key_codec: Any,
    value_codec: Any,
    **options,
) -> mx.array:
    """`tiled_attention`, through the decode kernel where the query is short enough for it."""
    short = queries.shape[2] <= decode.MAX_QUERY_TOKENS
    served = short and decode.serves(key_codec, value_codec)
    if served and trusted("decode", key_codec, value_codec):
        return decode.decode_attention(queries, keys, values, key_codec, value_codec, **options)
    return tiled_attention(queries, keys, values, key_codec, value_codec, **options)


def trusted(kernel: str, key_codec: Codec, value_codec: Codec) -> bool:
    """Whether this machine has a GPU whose kernel agrees with its twin: "encode", "search" (of
    trellis codes) or "decode"."""
    return backend() is not None and disagreement(kernel, key_codec, value_codec) is None


def report(key_codec: Codec, value_codec: Codec) -> dict[str, str | None]:
    """The kernels that can serve these codecs on this machine's GPU, each with why it is switched
    off, or None where it runs. Empty without a GPU."""
    codecs = (key_codec, value_codec)
    served = {
        "encode": encode.serves(*codecs),
        "search": all(isinstance(codec, TrellisCodec) for codec in codecs),
        "decode": decode.serves(*codecs),
    }
    names = [name for name, able in served.items() if able and backend() is not None]
    return {name: disagreement(name, *codecs) for name in names}


@lru_cache(maxsize=64)
def disagreement(kernel: str, key_codec: Codec, value_codec: Codec) -> str | None:
    """Why the kernel must not be used for these codecs, or None. Needs a GPU."""
    check = {"encode": _encode_error, "search": _search_error, "decode": _decode_error}[kernel]
    name = f"{kernel} kernel for keys {key_codec.spec} and values {value_codec.spec}"
    return fault(name, lambda: check(key_codec, value_codec), TOLERANCE)


def _random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _encode_error(key_codec: Any, value_codec: Any) -> float:
    """How much farther from the vectors the kernel's encoding is than the twin's, or nearer.

    Single codes may differ: a value next to a boundary between two is as near to either.
    """
    keys, values = (_random(1, 2, 64, c.dim, seed=c.dim) for c in (key_codec, value_codec))
    planes = encode.encode(keys, values, key_codec, value_codec)
    errors = [
        _distance(codec.decode(got), codec.rotate(x))
        - _distance(codec.decode(codec.encode(x)), codec.rotate(x))
        for codec, x, got in zip((key_codec, value_codec), (keys, values), planes, strict=True)
    ]
    return max(errors, key=abs)


def _search_error(codec: Any, _: Any) -> float:
    """How much farther from the vectors the kernel's codes are than the twin's, or nearer."""
    x = _random(64, codec.dim, seed=codec.dim)
    got, want = trellis_search.encode(codec, x), codec.encode(x)
    rotated = codec.rotate(x)
    return _distance(codec.decode(got), rotated) - _distance(codec.decode(want), rotated)


def _decode_error(key_codec: Any, value_codec: Any) -> float:
    """Relative distance of both attentions over 200 keys, with 8 query heads per KV head."""
    keys = key_codec.encode(_random(1, 2, 200, key_codec.dim, seed=1))
    values = value_codec.encode(_random(1, 2, 200, value_codec.dim, seed=2))
    queries = _random(1, 16, 2, key_codec.dim, seed=3)
    options = {"length": 200, "scale": key_codec.dim**-0.5, "mask": "causal"}
    got = decode.decode_attention(queries, keys, values, key_codec, value_codec, **options)
    with mx.stream(mx.cpu):  # GPUs round the factors of float32 products to 10 bits
        want = tiled_attention(queries, keys, values, key_codec, value_codec, **options)
    return _distance(got, want)


def _distance(got: mx.array, want: mx.array) -> float:
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()  # pyright: ignore
