"""Trellis-coded TurboQuant: the same bytes as Algorithm 1, a third less squared error.

After Tseng et al., QTIP (arXiv 2406.11235): a vector's codes are one circular bit stream of d*k
bits, and value i decodes from the L bits that start at bit i*k, its own k and the next L - k. A
value's level thus depends on its neighbours' codes, which is what a better code needs, and still
every value can be decoded by itself. The stream is circular ("tail-biting"), so no byte is spent
on a start state.

Beyond QTIP: the 2^L levels are trained (trellis_training.py), which at L = 8 does better than
random Gaussian levels at L = 10, with a table of 1 KB; and the sign of the scale, which a norm
does not need, says whether the stream codes the vector or its mirror image.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import mlx.core as mx
import numpy as np

from . import scaling
from .packing import pack, packed_shape
from .rotation import make_rotation
from .viterbi import tail_biting_path

WINDOWS = (8,)
BITS = (2, 3, 4)
_BATCH = 128  # vectors per search: its working set stays in the L2 cache


class TrellisCodec:
    """k bits per coordinate and one float16 scale per vector.

    Planes: the stream (d*k/8 bytes, little-endian), scales (1,) float16. Value i decodes to
    scale * codebook[L bits of the stream from bit i*k on, around the end to the start].

    The sign of a scale is that of the mirrored vector; its size keeps the norm, as in lloyd.py.
    """

    def __init__(self, dim: int, bits: int, *, window: int = 8, seed: int = 0):
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; the trellis code takes {_listed(BITS)}")
        if window not in WINDOWS:
            raise ValueError(f"window is {window}; the trellis code takes {_listed(WINDOWS)} bits")
        self.dim, self.bits, self.window = dim, bits, window
        self.spec = f"tcq{bits}-l{window}" + (f"-s{seed}" if seed else "")
        self._stream_plane = packed_shape(dim, bits)
        self._rotation = make_rotation("hadamard", dim, seed)
        self.codebook = trained_codebook(bits, window)
        self._pairs = _pair_table(bits, window)

    @property
    def bits_per_value(self) -> float:
        return self.bits + 16 / self.dim

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        return self._stream_plane, (1, scaling.SCALE_DTYPE)

    def rotate(self, x: mx.array) -> mx.array:
        return self._rotation.forward(x.astype(mx.float32))

    def unrotate(self, x: mx.array) -> mx.array:
        return self._rotation.inverse(x.astype(mx.float32))

    def encode(self, x: mx.array) -> tuple[mx.array, mx.array]:
        y, magnitude = scaling.bounded(x)
        y, norm = scaling.standardised(self.rotate(y))
        codes, length = self._search(np.array(y.reshape(x.size // self.dim, self.dim)))
        scale = magnitude * norm / mx.array(length).reshape(norm.shape)
        return pack(mx.array(codes).reshape(x.shape), self.bits), scaling.stored(scale)

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        stream, scales = planes
        index = pair_windows(stream, self.bits, self.window)
        levels = mx.take_along_axis(self._pairs, index.reshape(-1), 0).view(mx.float32)
        levels = levels.reshape(*stream.shape[:-1], self.dim)
        return (levels * scales.astype(mx.float32)).astype(dtype)

    def _search(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(vectors, d) -> codes (vectors, d) uint8, and the decoded vectors' signed norms."""
        codes = np.empty(y.shape, np.uint8)
        length = np.ones(len(y), np.float32)
        for start in range(0, len(y), _BATCH):
            x = np.ascontiguousarray(y[start : start + _BATCH].T)
            states = tail_biting_path(np.concatenate([x, -x], axis=1), self.codebook, self.bits)
            levels = self.codebook[states]
            norms = np.linalg.norm(levels, axis=0)
            cosine = (levels * np.concatenate([x, -x], axis=1)).sum(0) / norms
            plain, mirrored = np.split(np.arange(len(norms)), 2)
            better = np.where(cosine[mirrored] > cosine[plain], mirrored, plain)
            batch = slice(start, start + x.shape[1])
            codes[batch] = (states[:, better] % (1 << self.bits)).T
            length[batch] = np.where(better == plain, norms[better], -norms[better])
        return codes, length


def pair_windows(stream: mx.array, bits: int, window: int) -> mx.array:
    """Windows of values 2j and 2j + 1 as one integer of L + k bits: (..., width) -> (..., d / 2).

    A group of bytes that holds whole pairs (1 byte, or 3 at 3 bits), extended by the bytes after
    it, is shifted to each of its pairs.
    """
    pair, group = window + bits, 3 if bits == 3 else 1
    octets = stream.view(mx.uint8)
    count = octets.shape[-1]
    reach = -(-(8 * group - 2 * bits + pair) // 8)  # bytes that the last pair of a group needs
    octets = mx.concatenate([octets, octets[..., : reach - group]], axis=-1).astype(mx.uint32)
    word = octets[..., :count:group]
    for i in range(1, reach):
        word = word | (octets[..., i : count - group + 1 + i : group] << (8 * i))
    shifts = mx.arange(0, 8 * group, 2 * bits).astype(mx.uint32)
    return ((word[..., None] >> shifts) & ((1 << pair) - 1)).flatten(-2)


@lru_cache
def trained_codebook(bits: int, window: int) -> np.ndarray:
    """(2^L,) float32 levels in standard deviations; see trellis_training.py for how they came."""
    path = files("tqstack.turboquant") / "codebooks" / f"tcq{bits}-l{window}.npy"
    with path.open("rb") as file:
        levels = np.load(file).astype(np.float32)
    levels.setflags(write=False)
    return levels


@lru_cache
def _pair_table(bits: int, window: int) -> mx.array:
    """(2^(L+k),) uint64: the two float32 levels of each double window."""
    codebook = trained_codebook(bits, window)
    double = np.arange(1 << (window + bits))
    levels = np.stack([codebook[double % len(codebook)], codebook[double >> bits]], axis=1)
    return mx.array(levels.view(np.uint64)[:, 0])


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
