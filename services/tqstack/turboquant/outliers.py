"""Fractional widths by the paper's outlier split: strong channels get one bit more."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .kernel_layout import KernelLayout
from .lloyd import LloydCodec, split_width


def outlier_spec(bits: float, energy: np.ndarray) -> str:
    """Spec of the codec that gives the strongest channels the extra bit.

    bits: fractional, such as 2.5: half of the channels get 3 bits, half 2.
    energy: (d,) mean square of each channel, measured or read off a norm layer's weights.
    """
    (_, count), _ = split_width(len(energy), bits)
    strongest = np.argsort(-np.asarray(energy), kind="stable")[:count]
    return f"tq{bits:g}-o{sum(1 << int(channel) for channel in strongest):x}"


class OutlierCodec:
    """Two TurboQuant codes, each with its own rotation and scale (Zandieh et al., section 4.3).

    channels: set bits name the outlier channels, those coded with one bit more; their number
    must make the mean width `bits`.
    Planes: codes and scale of the outliers, codes and scale of the others.
    """

    kernel_layout: KernelLayout | None = None

    def __init__(self, dim: int, bits: float, channels: int):
        (high, count), (low, rest) = split_width(dim, bits)
        if channels >> dim or channels.bit_count() != count or not count:
            raise ValueError(
                f"outlier channels {channels:x} are {channels.bit_count()}; "
                f"{bits:g} bits of head_dim {dim} take {count} of 0 to {dim - 1}, and at least 1"
            )
        self.dim, self.bits = dim, bits
        self.spec = f"tq{bits:g}-o{channels:x}"
        order = sorted(range(dim), key=lambda channel: not channels >> channel & 1)
        self._order = mx.array(order)
        self._back = mx.array(np.argsort(order))
        self._outliers, self._others = LloydCodec(count, high), LloydCodec(rest, low)

    @property
    def bits_per_value(self) -> float:
        return self.bits + 32 / self.dim

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        return self._outliers.plane_shapes() + self._others.plane_shapes()

    def rotate(self, x: mx.array) -> mx.array:
        outliers, others = self._split(mx.take(x, self._order, axis=-1))
        return mx.concatenate(
            [self._outliers.rotate(outliers), self._others.rotate(others)], axis=-1
        )

    def unrotate(self, x: mx.array) -> mx.array:
        outliers, others = self._split(x)
        parts = [self._outliers.unrotate(outliers), self._others.unrotate(others)]
        return mx.take(mx.concatenate(parts, axis=-1), self._back, axis=-1)

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        finite = mx.isfinite(x).all(axis=-1, keepdims=True)
        outliers, others = self._split(mx.take(mx.where(finite, x, 0), self._order, axis=-1))
        return self._outliers.encode(outliers) + self._others.encode(others)

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        parts = [self._outliers.decode(planes[:2], dtype), self._others.decode(planes[2:], dtype)]
        return mx.concatenate(parts, axis=-1)

    def _split(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return x[..., : self._outliers.dim], x[..., self._outliers.dim :]
