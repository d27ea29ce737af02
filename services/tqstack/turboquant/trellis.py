"""Trellis-coded TurboQuant: the same bytes as Algorithm 1, a third less squared error.

After Tseng et al., QTIP (arXiv 2406.11235): a vector's codes are one circular bit stream of d*k
bits, and value i decodes from the L bits that start at bit i*k, its own k and the next L - k. A
value's level thus depends on its neighbours' codes, which is what a better code needs, and still
every value can be decoded by itself. The stream is circular ("tail-biting"), so no byte is spent
on a start state.

Ours: the 2^L levels are trained (trellis_training.py), which at L = 8 does better than random
Gaussian levels at L = 10, with a table of 1 KB; and the sign of the scale, which a norm does not
need, says whether the stream codes the vector or its mirror image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files

import mlx.core as mx
import numpy as np

from . import scaling
from .kernel_layout import KernelLayout
from .packing import pack, packed_shape
from .rotation import make_rotation

WINDOWS = (8,)
BITS = (1, 2, 3, 4)
Search = Callable[[mx.array], tuple[mx.array, mx.array]]
_BATCH = 128  # vectors per search: its working set stays in the L2 cache


class TrellisCodec:
    """k bits per coordinate and one float16 scale per vector.

    Planes: the stream (d*k/8 bytes, little-endian), scales (1,) float16. Value i decodes to
    scale * codebook[L bits of the stream from bit i*k on, around the end to the start].

    A scale is negative where the stream codes the mirrored vector. It makes the decoded vector
    reach exactly as far along the original as the original does, |x|^2 / <x, c> as in RaBitQ (Gao
    and Long, arXiv 2405.12497): what is left is at a right angle to x, so inner products with x
    and means over many values are not biased. Keeping the norm instead, as lloyd.py does,
    diverges an eighth more at 2 bits (docs/codec.md).
    """

    def __init__(self, dim: int, bits: int, *, window: int = 8, seed: int = 0):
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; the trellis code takes {_listed(BITS)}")
        if window not in WINDOWS:
            raise ValueError(f"window is {window}; the trellis code takes {_listed(WINDOWS)} bits")
        self.dim, self.bits, self.window = dim, bits, window
        self.spec = f"tcq{bits}-l{window}" + (f"-s{seed}" if seed else "")
        self._stream_plane = packed_shape(dim, bits)
        self.rotation = make_rotation("hadamard", dim, seed)
        self.codebook = trained_codebook(bits, window)
        self._pairs = _pair_table(bits, window)
        self.kernel_layout: KernelLayout | None = None
        if dim % 64 == 0:  # lanes read whole bytes of a stream, the last one around its end
            self.kernel_layout = KernelLayout(bits, window, dim, self.rotation, self.codebook)

    @property
    def bits_per_value(self) -> float:
        return self.bits + 16 / self.dim

    def plane_shapes(self) -> tuple[tuple[int, mx.Dtype], ...]:
        return self._stream_plane, (1, scaling.SCALE_DTYPE)

    def rotate(self, x: mx.array) -> mx.array:
        return self.rotation.forward(x.astype(mx.float32))

    def unrotate(self, x: mx.array) -> mx.array:
        return self.rotation.inverse(x.astype(mx.float32))

    def encode(self, x: mx.array, search: Search | None = None) -> tuple[mx.array, mx.array]:
        """search: another way, such as a kernel, to do what `search` does."""
        y, magnitude = scaling.bounded(x)
        y, norm = scaling.standardised(self.rotate(y))
        codes, reach = (search or self.search)(y.reshape(x.size // self.dim, self.dim))
        reach = mx.where(reach == 0, 1.0, reach).reshape(norm.shape)  # of a vector of zeros
        scale = magnitude * norm / reach
        return pack(codes.reshape(x.shape), self.bits), scaling.stored(scale)

    def decode(self, planes: tuple[mx.array, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        stream, scales = planes
        index = pair_windows(stream, self.bits, self.window)
        levels = mx.take_along_axis(self._pairs, index.reshape(-1), 0).view(mx.float32)
        levels = levels.reshape(*stream.shape[:-1], self.dim)
        return (levels * scales.astype(mx.float32)).astype(dtype)

    def search(self, y: mx.array) -> tuple[mx.array, mx.array]:
        """The codes nearest to each vector or to its mirror image, whichever are nearer.

        y: (vectors, d) of norm sqrt(d). Returns codes (vectors, d) of any integer type, and how
        far the vectors that they stand for reach along y (vectors,), negative for mirrored ones.
        """
        from .viterbi import tail_biting_path  # numba takes a third of a second to import

        values = np.array(y)
        codes, reach = np.empty(values.shape, np.uint8), np.ones(len(values), np.float32)
        for start in range(0, len(values), _BATCH):
            batch = slice(start, start + _BATCH)
            x = np.ascontiguousarray(values[batch].T)
            x = np.concatenate([x, -x], axis=1)
            states = tail_biting_path(x, self.codebook, self.bits)
            levels = self.codebook[states]
            along = (levels * x).sum(axis=0) / len(x) ** 0.5
            plain, mirrored = np.split(along / np.linalg.norm(levels, axis=0), 2)
            chosen = np.arange(len(plain)) + np.where(mirrored > plain, len(plain), 0)
            codes[batch] = states[:, chosen].T % (1 << self.bits)
            reach[batch] = np.where(mirrored > plain, -along[chosen], along[chosen])
        return mx.array(codes), mx.array(reach)


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
