"""Rotated affine quantisation through `mx.quantize`: the field's usual code, as a yardstick."""

from __future__ import annotations

import mlx.core as mx

from . import scaling
from .kernel_layout import KernelLayout
from .packing import packed_shape
from .rotation import make_rotation

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_LARGEST = 30000.0  # scales and biases are float16: a group's range has to fit


class AffineCodec:
    """b bits per coordinate with a float16 scale and bias per group of coordinates.

    Planes: codes as `mx.quantize` packs them, then scales and biases (d / group,) each.
    """

    kernel_layout: KernelLayout | None = None

    def __init__(self, dim: int, bits: int, *, group: int = 64, rotation: str = "hadamard"):
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; mx.quantize takes {', '.join(map(str, BITS))}")
        if group not in GROUPS or dim % group:
            raise ValueError(f"group is {group}; it must be 32, 64 or 128 and divide {dim}")
        self.dim, self.bits, self.group = dim, bits, group
        self.spec = f"affine{bits}-g{group}" + ("" if rotation == "hadamard" else f"-{rotation}")
        self._rotation = make_rotation(rotation, dim)

    @property
    def bits_per_value(self) -> float:
        return self.bits + 32 / self.group

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        per_group = (self.dim // self.group, scaling.SCALE_DTYPE)
        return packed_shape(self.dim, self.bits), per_group, per_group

    def rotate(self, x: mx.array) -> mx.array:
        return self._rotation.forward(x.astype(mx.float32))

    def unrotate(self, x: mx.array) -> mx.array:
        return self._rotation.inverse(x.astype(mx.float32))

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        y, magnitude = scaling.bounded(x)
        y = self.rotate(y) * mx.minimum(magnitude, 1e30)
        y = mx.clip(y, -_LARGEST, _LARGEST)
        rows = y.reshape(x.size // self.dim, self.dim)  # mx.quantize takes matrices only
        planes = mx.quantize(rows, group_size=self.group, bits=self.bits)
        planes = [plane.reshape(*x.shape[:-1], plane.shape[-1]) for plane in planes]
        return planes[0], *(plane.astype(scaling.SCALE_DTYPE) for plane in planes[1:])

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        codes, scales, biases = planes
        if not codes.size:  # MLX cannot dequantize nothing
            return mx.zeros((*codes.shape[:-1], self.dim), dtype=dtype)
        rows = codes.reshape(codes.size // codes.shape[-1], codes.shape[-1])
        scales, biases = (
            plane.reshape(rows.shape[0], plane.shape[-1]).astype(mx.float32)
            for plane in (scales, biases)
        )
        values = mx.dequantize(rows, scales, biases, group_size=self.group, bits=self.bits)
        return values.reshape(*codes.shape[:-1], self.dim).astype(dtype)
