"""TurboQuant, Algorithm 1: rotate, normalise, code each coordinate by a Lloyd-Max codebook."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from . import scaling
from .codebook import boundaries, lloyd_max
from .packing import codes_per_field, fields, pack, packed_shape
from .rotation import make_rotation

_ENCODE_RANGE = 8.0  # standard deviations; beyond lies the outermost code of every codebook
_ENCODE_CELLS = 1 << 16


class LloydCodec:
    """b bits per coordinate and one float16 scale per vector, or per group of coordinates.

    Planes: codes (d*b/8 bytes, see packing.py) and scales (groups,) float16. A value decodes to
    scale * codebook[code], so the scale is about norm / sqrt(group).

    With `corrected` the scale also undoes the shrinkage of the codebook, so that the decoded
    vector has the norm of the original: that costs no byte and halves the divergence of a
    model's answers, at slightly more squared error than the paper's plain form.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        *,
        group: int | None = None,
        rotation: str = "hadamard",
        corrected: bool = True,
        seed: int = 0,
    ):
        self.dim, self.bits, self.group = dim, bits, group or dim
        if dim % self.group or self.group < 8:
            raise ValueError(f"group is {group}; it must be at least 8 and divide head_dim {dim}")
        self.corrected = corrected
        options = [f"-g{self.group}"] * (self.group < dim) + [f"-{rotation}"] * (
            rotation != "hadamard"
        )
        options += ["-raw"] * (not corrected) + [f"-s{seed}"] * (seed != 0)
        self.spec = f"tq{bits}{''.join(options)}"
        self._code_plane = packed_shape(dim, bits)
        self._rotation = make_rotation(rotation, dim, seed)
        self.codebook = lloyd_max(bits, self.group)
        self._levels = mx.array(self.codebook)
        self._cells = _cell_codes(self.codebook)
        self._table = _field_table(self.codebook, bits)

    @property
    def bits_per_value(self) -> float:
        return self.bits + 16 / self.group

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        return self._code_plane, (self.dim // self.group, scaling.SCALE_DTYPE)

    def rotate(self, x: mx.array) -> mx.array:
        return self._rotation.forward(x.astype(mx.float32))

    def unrotate(self, x: mx.array) -> mx.array:
        return self._rotation.inverse(x.astype(mx.float32))

    def encode(self, x: mx.array) -> tuple[mx.array, mx.array]:
        y, magnitude = scaling.bounded(x)
        grouped = self.rotate(y).reshape(*x.shape[:-1], self.dim // self.group, self.group)
        grouped, norm = scaling.standardised(grouped)
        codes = self._nearest(grouped)
        levels = mx.take_along_axis(self._levels, codes.reshape(-1), 0).reshape(codes.shape)
        length = self.group**0.5
        if self.corrected:
            length = mx.linalg.norm(levels, axis=-1, keepdims=True)
        scale = magnitude[..., None] * norm / length
        return pack(codes.reshape(x.shape), self.bits), scaling.stored(scale[..., 0])

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        codes, scales = planes
        index = fields(codes, self.bits)
        # take_along_axis on a flat table of 64-bit pairs is by far MLX's fastest lookup on a CPU.
        levels = mx.take_along_axis(self._table, index.reshape(-1, 1), 0).view(mx.float32)
        levels = levels.reshape(*scales.shape, self.group)
        values = levels * scales.astype(mx.float32)[..., None]
        return values.reshape(*scales.shape[:-1], self.dim).astype(dtype)

    def _nearest(self, y: mx.array) -> mx.array:
        """Codes of unit-variance coordinates, by a table over a fine grid (an eighth of the cost
        of comparisons; a value within 1e-4 of a boundary may go to either side)."""
        step = _ENCODE_CELLS / (2 * _ENCODE_RANGE)
        cell = mx.clip(y * step + _ENCODE_CELLS // 2, 0, _ENCODE_CELLS - 1).astype(mx.uint16)
        return mx.take_along_axis(self._cells, cell.reshape(-1), 0).reshape(y.shape)


def _cell_codes(codebook: np.ndarray) -> mx.array:
    """(65536,) uint8: the nearest code at the centre of each cell of the encoding grid."""
    centres = (np.arange(_ENCODE_CELLS) + 0.5) * (2 * _ENCODE_RANGE / _ENCODE_CELLS) - _ENCODE_RANGE
    return mx.array(np.searchsorted(boundaries(codebook), centres).astype(np.uint8))


def _field_table(codebook: np.ndarray, bits: int) -> mx.array:
    """(fields, codes / 2) uint64, each two float32 levels; (256, 1) float32 at 8 bits."""
    count = codes_per_field(bits)
    field = np.arange(1 << (bits * count))[:, None]
    levels = codebook[(field >> (bits * np.arange(count))) & ((1 << bits) - 1)]
    return mx.array(levels if count == 1 else levels.view(np.uint64))
