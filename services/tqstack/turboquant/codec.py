"""What a codec is, and the codec of a spec string."""

from __future__ import annotations

import re
from typing import Protocol

import mlx.core as mx

from .lloyd import LloydCodec


class Codec(Protocol):
    """Compresses the last axis (head_dim d) of an array.

    The stored form is a tuple of planes: arrays with the leading axes of the input and a last
    axis of their own, so that a cache can pad, slice, concatenate and save them unseen.

    Whatever goes in, every stored scale is finite: a vector with NaN or Inf is stored as zeros,
    one whose norm exceeds float16 saturates, and zeros decode to exact zeros.
    """

    dim: int
    spec: str
    """make_codec(spec, dim) gives an equal codec: same rotation, same bytes."""

    @property
    def bits_per_value(self) -> float:
        """Really stored, scales included: 8 * bytes / d."""
        ...

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        """(width, dtype) of each plane's last axis."""
        ...

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        """(..., d) of any float type -> planes (..., width)."""
        ...

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        """planes -> (..., d) in the rotated domain."""
        ...

    def rotate(self, x: mx.array) -> mx.array:
        """Queries go in: <rotate(q), decode(encode(k))> is about <q, k>. Float32."""
        ...

    def unrotate(self, x: mx.array) -> mx.array:
        """Outputs come back: the inverse, and transpose, of `rotate`. Float32."""
        ...


class Uncompressed:
    """The values themselves in float16 (`none`): for layers kept at full precision."""

    spec = "none"
    bits_per_value = 16.0

    def __init__(self, dim: int):
        self.dim = dim

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        return ((self.dim, mx.float16),)

    def encode(self, x: mx.array) -> tuple[mx.array]:
        finite = mx.isfinite(x).all(axis=-1, keepdims=True)
        return (mx.where(finite, mx.clip(x, -65504, 65504), 0.0).astype(mx.float16),)

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        return planes[0].astype(dtype)

    def rotate(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32)

    unrotate = rotate


_LLOYD = re.compile(r"tq(\d+)(?:-g(\d+))?(?:-(qr|none))?(-raw)?(?:-s(\d+))?")


def make_codec(spec: str, dim: int) -> Codec:
    """The codec that `spec` names, for vectors of `dim` values. ValueError says what is allowed.

    none                          float16 values
    tqB[-gG][-qr|-none][-raw][-sS]  TurboQuant: B bits (1-8), a scale per G coordinates instead
                                  of per vector, QR or no rotation instead of Hadamard, scales
                                  not norm-corrected, another seed of the rotation
    """
    if dim <= 0 or dim % 8:
        raise ValueError(f"head_dim is {dim}; codecs take positive multiples of 8")
    if spec == "none":
        return Uncompressed(dim)
    if match := _LLOYD.fullmatch(spec):
        bits, group, rotation, raw, seed = match.groups()
        return LloydCodec(
            dim,
            int(bits),
            group=int(group) if group else None,
            rotation=rotation or "hadamard",
            corrected=raw is None,
            seed=int(seed or 0),
        )
    raise ValueError(f"codec spec {spec!r} is unknown; examples: tq4, tq3-g64, tq4-qr, none")
