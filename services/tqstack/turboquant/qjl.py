"""TurboQuant, Algorithm 2: a code whose inner products are unbiased.

One bit less of the Lloyd-Max code, and for the residual r one bit per row of a Gaussian matrix S:
sign(S r), a quantised Johnson-Lindenstrauss transform (Zandieh et al., arXiv 2406.03482 and
2504.19874). sqrt(pi/2)/d * |r| * S^T sign(S r) has the mean r, so the sum estimates every inner
product without bias, with variance about pi/2 * |r|^2 * |q|^2 / d.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from . import scaling
from .kernel_layout import KernelLayout
from .lloyd import ScalarCode
from .packing import pack, packed_shape, unpack
from .rotation import make_rotation

_SKETCH = 0x514A4C  # keeps the sketch's random numbers apart from the rotation's


class ProdCodec:
    """b bits per coordinate in all: b - 1 of Lloyd-Max (none for b = 1), one of residual sketch.

    Planes: Lloyd-Max codes (left out for b = 1), sketch signs (d/8 bytes), and two float16:
    the norm and the residual's norm, both over sqrt(d).

    Attention does better with the plain code, which has a fifth of the squared error at the same
    size (docs/codec.md). This is for inner products that are compared or summed as they are.
    """

    kernel_layout: KernelLayout | None = None

    def __init__(self, dim: int, bits: int, *, seed: int = 0):
        if not 1 <= bits <= 8:
            raise ValueError(f"bits is {bits}; Algorithm 2 takes 1 to 8")
        self.dim, self.bits = dim, bits
        self.spec = f"prod{bits}" + (f"-s{seed}" if seed else "")
        self._rotation = make_rotation("hadamard", dim, seed)
        self._code = ScalarCode(bits - 1, dim, dim) if bits > 1 else None
        rng = np.random.default_rng([seed, dim, _SKETCH])
        self._sketch = mx.array(rng.standard_normal((dim, dim)).astype(np.float32))

    @property
    def bits_per_value(self) -> float:
        return self.bits + 32 / self.dim

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        codes = (self._code.plane,) if self._code else ()
        return *codes, packed_shape(self.dim, 1), (2, scaling.SCALE_DTYPE)

    def rotate(self, x: mx.array) -> mx.array:
        return self._rotation.forward(x.astype(mx.float32))

    def unrotate(self, x: mx.array) -> mx.array:
        return self._rotation.inverse(x.astype(mx.float32))

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        y, magnitude = scaling.bounded(x)
        y, norm = scaling.standardised(self.rotate(y))
        codes, residual = (), y
        if self._code:
            packed, levels = self._code.encode(y)
            codes, residual = (packed,), y - levels
        signs = pack(residual @ self._sketch.T >= 0, 1)
        length = mx.linalg.norm(residual, axis=-1, keepdims=True) / self.dim**0.5
        norm = magnitude * norm / self.dim**0.5
        scales = mx.concatenate([norm, norm * length], axis=-1)
        return *codes, signs, scaling.stored(scales)

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        *codes, signs, scales = planes
        scales = scales.astype(mx.float32)
        sketched = 2 * unpack(signs, 1, self.dim).astype(mx.float32) - 1
        unbias = math.sqrt(math.pi / (2 * self.dim))
        values = (sketched @ self._sketch) * (scales[..., 1:] * unbias)
        if self._code:
            values = values + self._code.decode(codes[0]) * scales[..., :1]
        return values.astype(dtype)
