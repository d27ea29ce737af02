"""TurboQuant, Algorithm 1: rotate, normalise, code each coordinate by a Lloyd-Max codebook."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import scaling
from .codebook import boundaries, lloyd_max
from .kernel_layout import KernelLayout
from .packing import codes_per_field, fields, pack, packed_shape
from .rotation import make_rotation

_ENCODE_RANGE = 8.0  # standard deviations; beyond lies the outermost code of every codebook
_ENCODE_CELLS = 1 << 16


class LloydCodec:
    """b bits per coordinate and one float16 scale per vector, or per group of coordinates.

    Planes: codes (d*b/8 bytes, see packing.py), then scales (groups,) float16. A value decodes to
    scale * codebook[code], so the scale is about norm / sqrt(group). A fractional width gives the
    first coordinates one bit more than the last, in a plane of their own: after a rotation all
    are alike. (outliers.py splits channels that are not.)

    With `corrected` the scale also undoes the shrinkage of the codebook, so that the decoded
    vector has the norm of the original: that costs no byte and halves the divergence of a
    model's answers, at slightly more squared error than the paper's plain form below 4 bits.
    """

    def __init__(
        self,
        dim: int,
        bits: float,
        *,
        group: int | None = None,
        rotation: str = "hadamard",
        corrected: bool = True,
        seed: int = 0,
    ):
        self.dim, self.bits, self.group = dim, bits, group or dim
        if dim % self.group or self.group < 8:
            raise ValueError(f"group is {group}; it must be at least 8 and divide head_dim {dim}")
        if bits % 1 and self.group < dim:
            raise ValueError(f"bits is {bits:g}; groups of {group} take whole bits")
        self.corrected = corrected
        self.spec = f"tq{bits:g}" + _suffix(self.group < dim, f"-g{self.group}")
        self.spec += _suffix(rotation != "hadamard", f"-{rotation}")
        self.spec += _suffix(not corrected, "-raw") + _suffix(seed != 0, f"-s{seed}")
        self.rotation = make_rotation(rotation, dim, seed)
        self.codes = tuple(
            ScalarCode(width, part, self.group) for width, part in split_width(dim, bits) if part
        )
        self.kernel_layout: KernelLayout | None = None
        if len(self.codes) == 1:
            self.kernel_layout = KernelLayout(
                int(bits), 0, self.group, self.rotation, self.codes[0].codebook
            )

    @property
    def bits_per_value(self) -> float:
        return self.bits + 16 / self.group

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        scales = (self.dim // self.group, scaling.SCALE_DTYPE)
        return *(code.plane for code in self.codes), scales

    def rotate(self, x: mx.array) -> mx.array:
        return self.rotation.forward(x.astype(mx.float32))

    def unrotate(self, x: mx.array) -> mx.array:
        return self.rotation.inverse(x.astype(mx.float32))

    def encode(self, x: mx.array) -> tuple[mx.array, ...]:
        y, magnitude = scaling.bounded(x)
        grouped = (*x.shape[:-1], self.dim // self.group, self.group)
        y, norm = scaling.standardised(self.rotate(y).reshape(grouped))
        parts = mx.split(y.reshape(x.shape), self._split_points(), axis=-1)
        coded = [code.encode(part) for code, part in zip(self.codes, parts, strict=True)]
        length = self.group**0.5
        if self.corrected:
            levels = mx.concatenate([levels for _, levels in coded], axis=-1)
            length = mx.linalg.norm(levels.reshape(grouped), axis=-1)
        scale = magnitude * norm[..., 0] / length
        return *(codes for codes, _ in coded), scaling.stored(scale)

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        *codes, scales = planes
        levels = [code.decode(part) for code, part in zip(self.codes, codes, strict=True)]
        whole = levels[0] if len(levels) == 1 else mx.concatenate(levels, axis=-1)
        values = whole.reshape(*scales.shape, self.group) * scales.astype(mx.float32)[..., None]
        return values.reshape(*scales.shape[:-1], self.dim).astype(dtype)

    def _split_points(self) -> list[int]:
        return [self.codes[0].dim] if len(self.codes) > 1 else []


class ScalarCode:
    """A Lloyd-Max code of `dim` unit-variance coordinates, each by itself, packed.

    levels_dim: dimension of the vector that the coordinates come from (see codebook.py).
    """

    def __init__(self, bits: int, dim: int, levels_dim: int):
        self.bits, self.dim = bits, dim
        self.plane = packed_shape(dim, bits)
        self.codebook = lloyd_max(bits, levels_dim)
        self._levels, self._cells, self._table = _tables(bits, levels_dim)

    def encode(self, y: mx.array) -> tuple[mx.array, mx.array]:
        """(..., dim) -> packed codes (..., width), and the levels (..., dim) they stand for.

        Codes are looked up on a fine grid, at a third of the cost of comparisons; a value within
        1e-4 of a boundary may go to either side.
        """
        step = _ENCODE_CELLS / (2 * _ENCODE_RANGE)
        cell = mx.clip(y * step + _ENCODE_CELLS // 2, 0, _ENCODE_CELLS - 1).astype(mx.uint16)
        codes = mx.take_along_axis(self._cells, cell.reshape(-1), 0)
        levels = mx.take_along_axis(self._levels, codes, 0)
        return pack(codes.reshape(y.shape), self.bits), levels.reshape(y.shape)

    def decode(self, packed: mx.array) -> mx.array:
        """(..., width) -> (..., dim) float32 levels."""
        # take_along_axis on a flat table of 64-bit pairs is by far MLX's fastest lookup on a CPU.
        index = fields(packed, self.bits).reshape(-1, 1)
        levels = mx.take_along_axis(self._table, index, 0).view(mx.float32)
        return levels.reshape(*packed.shape[:-1], self.dim)


def split_width(dim: int, bits: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bits + 1, coordinates), (bits, coordinates) whose mean width is the wanted one."""
    low = int(bits)
    high_dim = round((bits - low) * dim)
    if abs(high_dim - (bits - low) * dim) > 1e-6 or high_dim % 8:
        raise ValueError(
            f"bits is {bits:g}; for head_dim {dim} a fraction must be a multiple of 8/{dim}"
        )
    return (low + 1, high_dim), (low, dim - high_dim)


@lru_cache(maxsize=64)
def _tables(bits: int, levels_dim: int) -> tuple[mx.array, mx.array, mx.array]:
    """Levels (2^b,), codes of the encoding grid (65536,) uint8, and levels of packed fields:
    (fields, codes / 2) uint64, each two float32 levels; (256, 1) float32 at 8 bits."""
    codebook = lloyd_max(bits, levels_dim)
    centres = (np.arange(_ENCODE_CELLS) + 0.5) * (2 * _ENCODE_RANGE / _ENCODE_CELLS) - _ENCODE_RANGE
    cells = np.searchsorted(boundaries(codebook), centres).astype(np.uint8)
    count = codes_per_field(bits)
    field = np.arange(1 << (bits * count))[:, None]
    levels = codebook[(field >> (bits * np.arange(count))) & ((1 << bits) - 1)]
    table = levels if count == 1 else levels.view(np.uint64)
    return mx.array(codebook), mx.array(cells), mx.array(table)


def _suffix(present: bool, text: str) -> str:
    return text if present else ""
