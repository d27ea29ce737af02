"""What a codec is, and the codec of a spec string."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Protocol

import mlx.core as mx

from .affine import AffineCodec
from .kernel_layout import KernelLayout
from .lloyd import LloydCodec
from .outliers import OutlierCodec
from .qjl import ProdCodec
from .trellis import TrellisCodec


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
    kernel_layout: KernelLayout | None
    """None: no kernel reads such planes."""

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
    kernel_layout: KernelLayout | None = None

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


def make_codec(spec: str, dim: int) -> Codec:
    """The codec that `spec` names, for vectors of `dim` values. ValueError says what is allowed.

    none                 float16 values
    tqB[-gG][-qr|-none][-raw][-sS]
                         TurboQuant, B bits (1-8, fractions such as 3.5): a scale per G coordinates
                         instead of per vector, QR or no rotation instead of Hadamard, scales not
                         norm-corrected, another seed of the rotation
    tqB-oHEX             fractional B with the extra bit on the channels whose bits HEX sets
    prodB[-sS]           TurboQuant's Algorithm 2: B - 1 bits and a one-bit residual sketch
    tcqB-lL[-sS]         trellis-coded TurboQuant: B of 2, 3, 4 and windows of L = 8 bits
    affineB-gG[-qr|-none]
                         mx.quantize after the rotation
    """
    if dim <= 0 or dim % 8:
        raise ValueError(f"head_dim is {dim}; codecs take positive multiples of 8")
    return codec_maker(spec)(dim)


def codec_maker(spec: str) -> Callable[[int], Codec]:
    """What makes the codec of `spec` for a head_dim; ValueError if no codec has such a spec."""
    if spec == "none":
        return Uncompressed
    for pattern, make in _FAMILIES:
        if match := pattern.fullmatch(spec):
            return partial(make, **{k: v for k, v in match.groupdict().items() if v is not None})
    raise ValueError(f"codec spec {spec!r} is unknown; examples: tq4, tq3-g64, tq4-qr, none")


def _lloyd(dim: int, bits: str, group="0", rotation="hadamard", raw="", seed="0") -> Codec:
    return LloydCodec(
        dim,
        float(bits),
        group=int(group) or None,
        rotation=rotation,
        corrected=not raw,
        seed=int(seed),
    )


def _outlier(dim: int, bits: str, channels: str) -> Codec:
    return OutlierCodec(dim, float(bits), int(channels, 16))


def _prod(dim: int, bits: str, seed="0") -> Codec:
    return ProdCodec(dim, int(bits), seed=int(seed))


def _trellis(dim: int, bits: str, window: str, seed="0") -> Codec:
    return TrellisCodec(dim, int(bits), window=int(window), seed=int(seed))


def _affine(dim: int, bits: str, group: str, rotation="hadamard") -> Codec:
    return AffineCodec(dim, int(bits), group=int(group), rotation=rotation)


_WIDTH = r"(?P<bits>\d+(?:\.\d+)?)"
_GROUP = r"-g(?P<group>[1-9]\d*)"
_ROTATION = r"(?:-(?P<rotation>qr|none))?"
_SEED = r"(?:-s(?P<seed>\d+))?"
_FAMILIES = (
    (re.compile(rf"tq{_WIDTH}(?:{_GROUP})?{_ROTATION}(?P<raw>-raw)?{_SEED}"), _lloyd),
    (re.compile(rf"tq{_WIDTH}-o(?P<channels>[0-9a-f]+)"), _outlier),
    (re.compile(rf"prod(?P<bits>\d+){_SEED}"), _prod),
    (re.compile(rf"tcq(?P<bits>\d+)-l(?P<window>\d+){_SEED}"), _trellis),
    (re.compile(rf"affine(?P<bits>\d+){_GROUP}{_ROTATION}"), _affine),
)
